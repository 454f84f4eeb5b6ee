# caisson: `make demo` builds everything and runs a real container; `make test` builds and passes all tests.
# `make help` lists the rest. Needs Debian 12, root or sudo, and Rust 1.95 or newer.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

TARGET  := x86_64-unknown-linux-gnu
RELEASE := target/$(TARGET)/release
AGENT   := target/$(TARGET)/agent/caisson-agent
GUEST   := target/guest
DOCUMENTS := target/documents
PREFIX  ?= /usr
DESTDIR ?=
SUDO    := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

# Host packages of the build: static libraries, the lab's QEMU, the compiler of the CRI's protocol.
PACKAGES := build-essential pkg-config libseccomp-dev libcap-ng-dev qemu-system-x86 qemu-system-common \
            e2fsprogs kmod mmdebstrap protobuf-compiler

.PHONY: help
help: ## Say what can be made
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

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
	cargo build --release --workspace --exclude caisson-agent --bins
	cargo build --profile agent -p caisson-agent --bins

.PHONY: initramfs
initramfs: binaries ## Build the guest's initial root file system
	$(RELEASE)/caisson-rootfs-builder initramfs --agent $(AGENT) --output $(GUEST)/initramfs.cpio

.PHONY: build
build: kernel initramfs ## Build everything

.PHONY: lint
lint: deps ## Check formatting and lints
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy -p caisson-tests -p caisson-containerd-tests --test '*' -- -D warnings # those that a plain `cargo test` leaves out

.PHONY: unit
unit: deps ## Run the unit tests (no root, no KVM)
	cargo test --workspace --lib --bins

# Where end-to-end tests run: here, on a host with VMX or SVM; else in the lab.
LAB     := $(RELEASE)/lab
HAVE_VM := $(shell grep -qwE 'vmx|svm' /proc/cpuinfo && [ -e /dev/kvm ] && echo yes)
IN_LAB  := $(if $(HAVE_VM),$(SUDO) env PATH="$(CURDIR)/$(RELEASE):$$PATH",$(LAB) exec --)
ARGS    ?=
# MiB through a pipe each way in the bulk test: a minute or two for the whole GiB on an emulated processor.
BULK_MIB ?= 1024

.PHONY: lab
lab: binaries ## Build the lab's program and image
	$(if $(HAVE_VM),,$(LAB) image)

# Every suite runs on runc too: that tests the tests.
.PHONY: e2e
e2e: build lab ## Run the end-to-end tests on runc and on caisson; ARGS chooses tests
	LAB="$(if $(HAVE_VM),,$(CURDIR)/$(LAB))" SUDO=$(SUDO) CAISSON_TEST_BULK_MIB=$(BULK_MIB) tests/run e2e $(ARGS)

# The other suites change the system that they run on: only in the lab, which has images for them.
# Debian's podman and Docker with each runtime in the place of their own, and systemd's cgroups, as they come.
.PHONY: engines
engines: build lab ## Run the tests with podman and Docker; ARGS chooses tests
	tests/engines/rootfs target/server.tar
	LAB=$(CURDIR)/$(LAB) CAISSON_TEST_SERVER_ROOTFS=$(CURDIR)/target/server.tar tests/run engines $(ARGS)

# 200 cycles of pods take an hour on an emulated processor. The kubelet's cgroup driver is cgroupfs, then, for those tests
# that are about cgroups and ends, systemd.
SYSTEMD_TESTS := cri_systemd bootstrap stats_count limits_change oom_killed init_container
POD_CYCLES ?= 10
PODS ?= 8
.PHONY: containerd
containerd: build lab ## Run the tests under containerd; ARGS chooses tests, POD_CYCLES and PODS say how many
	LAB=$(CURDIR)/$(LAB) CAISSON_TEST_POD_CYCLES=$(POD_CYCLES) CAISSON_TEST_PODS=$(PODS) tests/run containerd $(ARGS)
	LAB=$(CURDIR)/$(LAB) CAISSON_TEST_POD_CYCLES=2 CAISSON_TEST_CGROUPS=systemd tests/run containerd $(or $(ARGS),$(SYSTEMD_TESTS))

.PHONY: systemd
systemd: build lab ## Run the tests of --systemd-cgroup; ARGS chooses tests
	LAB=$(CURDIR)/$(LAB) tests/run systemd $(ARGS)

# What a host with cgroup v1 makes different; on labs that mount its hierarchies, without systemd and with it.
V1_TESTS := host:: kills::during_run::the_m kills::during_delete::the_monitor
.PHONY: cgroup-v1
cgroup-v1: build lab ## Run the tests that touch the host's cgroups with cgroup v1; ARGS chooses others
	LAB=$(CURDIR)/$(LAB) tests/run cgroup-v1 $(or $(ARGS),$(V1_TESTS))
	$(if $(ARGS),,LAB=$(CURDIR)/$(LAB) tests/run systemd-v1)

.PHONY: test
test: lint unit e2e cgroup-v1 systemd ## Build and pass all tests (with `make containerd` and `make engines` those of other people's programs)

.PHONY: demo
demo: build lab ## Run a real container: a Debian root file system, Python, SQLite
	$(SUDO) tests/demo/rootfs target/demo/rootfs
	$(if $(HAVE_VM),,$(LAB) up --smp 1)
	$(IN_LAB) tests/demo/run target/demo/rootfs $(GUEST)
	$(if $(HAVE_VM),,$(LAB) down)

# Where instructions are counted, nothing runs in parallel: 20 pods at once take long.
ICOUNT := LAB_STATE=target/lab/icount $(LAB) run --icount
BENCH_PODS ?= 20
.PHONY: bench
bench: build lab bench-pods ## Count what containers and pods cost, beside runc, crun and QEMU microvm
	$(ICOUNT) -- env LAB_ICOUNT=1 $(CURDIR)/$(RELEASE)/bench

.PHONY: bench-pods
bench-pods: build lab ## Count what pods cost under containerd's CRI, one by one and BENCH_PODS at once
	cargo test --release -p caisson-containerd-tests --test containerd --no-run
	program=$$(ls -t $(CURDIR)/$(RELEASE)/deps/containerd-* | grep -v '\.d$$' | head -n 1); \
	$(ICOUNT) --image systemd -e CAISSON_TEST_PODS=$(BENCH_PODS) -- \
	  $(CURDIR)/tests/containerd/bench "$$program" $(CURDIR)/$(RELEASE) $(CURDIR)/$(GUEST)

.PHONY: documents
documents: deps ## Write the manual pages and the shells' completions
	cargo run --release -q -p caisson --example documents -- $(DOCUMENTS)

.PHONY: install
install: build documents ## Install to $(DESTDIR)$(PREFIX)
	install -D -t $(DESTDIR)$(PREFIX)/bin $(RELEASE)/caisson $(RELEASE)/containerd-shim-caisson-v2
	install -D -t $(DESTDIR)$(PREFIX)/lib/caisson $(RELEASE)/caisson-vmm
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/caisson $(GUEST)/vmlinux $(GUEST)/initramfs.cpio
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man8 $(DOCUMENTS)/man/*.8
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DOCUMENTS)/completions/caisson
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/zsh/vendor-completions $(DOCUMENTS)/completions/_caisson
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d $(DOCUMENTS)/completions/caisson.fish
	[ -e $(DESTDIR)/etc/caisson/config.toml ] || install -D -m 644 -t $(DESTDIR)/etc/caisson runtime/src/config.toml

DEB := target/caisson.deb
CARGO_DEB := target/tools/bin/cargo-deb

$(CARGO_DEB):
	cargo install cargo-deb --locked --version 3.8.0 --root target/tools

.PHONY: deb
deb: build documents $(CARGO_DEB) ## Make a Debian package
	$(CARGO_DEB) -q -p caisson --no-build --no-strip --target $(TARGET) --output $(DEB)
	@echo "$(DEB): $$(dpkg-deb -f $(DEB) Package Version | paste -sd' ')"

.PHONY: package
package: deb lab ## Install the package in the lab, run a container from it, remove it
	$(if $(HAVE_VM),,$(LAB) up --smp 1)
	$(IN_LAB) $(CURDIR)/tests/package/run $(CURDIR)/$(DEB) $(CURDIR)/runtime/deploy/install
	$(if $(HAVE_VM),,$(LAB) down)

SCHEMAS := target/tools/schemas

$(SCHEMAS)/bin/kubernetes-validate: | deps
	python3 -c 'import ensurepip' 2>/dev/null || $(SUDO) apt-get install -qy --no-install-recommends python3-venv
	python3 -m venv $(SCHEMAS)
	$(SCHEMAS)/bin/pip install -q kubernetes-validate==1.37.0

.PHONY: manifests
manifests: $(SCHEMAS)/bin/kubernetes-validate ## Check the Kubernetes manifests against the published schemas
	$(SCHEMAS)/bin/kubernetes-validate --strict runtime/deploy/*.yaml

.PHONY: clean
clean: ## Remove what was built (not the caches)
	cargo clean
