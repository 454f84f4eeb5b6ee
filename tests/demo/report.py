"""What the demo's container does: fills an SQLite database, queries it, writes a report to the volume."""

import os
import platform
import random
import sqlite3
import sys

VOLUME = "/volume"

random.seed(2026)
db = sqlite3.connect(f"{VOLUME}/orders.db")
db.execute("PRAGMA journal_mode = WAL")
db.execute("DROP TABLE IF EXISTS orders")
db.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, city TEXT, cents INTEGER)")
cities = ["Aachen", "Bergen", "Cadiz", "Dublin", "Espoo"]
with db:
    db.executemany(
        "INSERT INTO orders (city, cents) VALUES (?, ?)",
        ((random.choice(cities), random.randrange(100, 100_000)) for _ in range(20_000)),
    )
    db.execute("CREATE INDEX by_city ON orders (city, cents)")

rows = db.execute(
    "SELECT city, COUNT(*), SUM(cents), MAX(cents) FROM orders GROUP BY city ORDER BY SUM(cents) DESC"
).fetchall()
check = db.execute("PRAGMA integrity_check").fetchone()[0]
db.close()

lines = [f"{'city':<10}{'orders':>8}{'total':>14}{'largest':>10}"]
lines += [f"{c:<10}{n:>8}{s / 100:>14,.2f}{m / 100:>10,.2f}" for c, n, s, m in rows]
lines += [f"integrity check: {check}"]
with open(f"{VOLUME}/report.txt", "w", encoding="utf-8") as report:
    report.write("\n".join(lines) + "\n")

print("\n".join(lines))
print(f"guest: kernel {platform.release()}, {os.cpu_count()} CPU, PID {os.getpid()}, host name {platform.node()}")
sys.exit(0 if check == "ok" and sum(n for _, n, _, _ in rows) == 20_000 else 1)
