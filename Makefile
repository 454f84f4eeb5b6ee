# caisson: `make demo` builds everything and runs a real container; `make test` builds and passes all tests.
# `make help` lists the rest. Needs Debian 12, root or sudo, and Rust 1.95 or newer.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

TARGET  := x86_64-unknown-linux-gnu
RELEASE := target/$(TARGET)/release
GUEST   := target/guest
PREFIX  ?= /usr
DESTDIR ?=
SUDO    := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

# Host packages of the build: static libraries, and the lab's QEMU.
PACKAGES := build-essential pkg-config libseccomp-dev libcap-ng-dev qemu-system-x86 qemu-system-common \
            e2fsprogs kmod mmdebstrap

.PHONY: help
help: ## Say what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.PHONY: deps
deps:
	@command -v cargo >/dev/null || { echo "Rust is missing: install Rust 1.95 or newer with rustup, then run make again" >&2; exit 1; }
	@missing=(); for p in $(PACKAGES); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing+=($$p); done; \
	if [ $${#missing[@]} -gt 0 ]; then echo "installing $${missing[*]}"; $(SUDO) apt-get update -q && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$${missing[@]}"; fi

.PHONY: kernel
kernel: deps ## Build the guest kernel (cached by the hash of its inputs)
	$(SUDO) true; guest-kernel/build $(GUEST)/vmlinux

.PHONY: binaries
binaries: deps ## Build caisson, its VMM, the agent and the tools
	cargo build --release --workspace --bins

.PHONY: initramfs
initramfs: binaries ## Build the guest's initial root file system
	$(RELEASE)/caisson-rootfs-builder initramfs --agent $(RELEASE)/caisson-agent --output $(GUEST)/initramfs.cpio

.PHONY: build
build: kernel initramfs ## Build everything

.PHONY: lint
lint: deps ## Check formatting and lints
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

.PHONY: install
install: build ## Install to $(DESTDIR)$(PREFIX)
	install -D -t $(DESTDIR)$(PREFIX)/bin $(RELEASE)/caisson
	install -D -t $(DESTDIR)$(PREFIX)/lib/caisson $(RELEASE)/caisson-vmm
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/caisson $(GUEST)/vmlinux $(GUEST)/initramfs.cpio

.PHONY: clean
clean: ## Remove what was built (not the caches)
	cargo clean
