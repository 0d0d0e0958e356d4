# SPDX-License-Identifier: Apache-2.0
#
# `make bench` runs the main job and `make test` the tests; each does all its own set-up. `make` alone prints help.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Prerequisites are steps in an order, and each of them keeps every processor busy by itself.
.NOTPARALLEL:

GO ?= go
# Without cgo the binaries are the same whether or not the host has a C compiler.
export CGO_ENABLED := 0
# The commit is stamped below. Go's own stamp fails when root builds in a user's checkout.
export GOFLAGS := $(GOFLAGS) -buildvcs=false

# The system's folders are not in everybody's PATH, nor in root's after su.
export PATH := $(PATH):/usr/sbin:/sbin

PROVIDER ?= auto,guest
# What takes long to build and outlives a checkout.
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/plimsoll
export PLIMSOLL_CACHE := $(CACHE)
PROFILE ?= default
OUT ?=
ARGS ?=
TESTFLAGS ?= $(if $(CI),-v)

# Measuring needs root, building does not: what follows $(SUDO) runs as root, everything else as the caller.
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo env NO_INSTALL='$(NO_INSTALL)' CI='$(CI)' PLIMSOLL_CACHE='$(CACHE)')
INSTALL = @$(SUDO) bin/plimsoll doctor --install
GIT := git -c safe.directory='$(CURDIR)'
BINARIES := bin/kube-apiserver bin/kube-proxy bin/etcd

# Programs by the caller, in the caller's caches; file systems and archives of them by root.
define make-images
$(INSTALL) --with node-image
@$(MAKE) --no-print-directory -C clusters/kind/nodeimage programs GO='$(GO)' CACHE='$(CACHE)'
@$(SUDO) env PATH="$$PATH" GOPATH="$$($(GO) env GOPATH)" GOCACHE="$$($(GO) env GOCACHE)" GOFLAGS='$(GOFLAGS)' \
$(MAKE) --no-print-directory -C clusters/kind/nodeimage $(1) GO='$(GO)' CACHE='$(CACHE)'
endef

.PHONY: help
help: ## print this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  make bench PROFILE=quick           a first picture; PROFILE=default|full climb higher'
	@echo '  make bench OUT=DIR ARGS="--seed 2" results go to DIR; ARGS are flags of plimsoll run'
	@echo '  NO_INSTALL=1                       print what would be installed, and install nothing'

# Guests alone need no root.
.PHONY: bench
bench: go-version $(if $(filter guest,$(PROVIDER)),,root) bin/plimsoll $(if $(filter guest,$(PROVIDER)),,packages) $(if $(findstring guest,$(PROVIDER)),guest-parts) $(BINARIES) ## set up, then measure the load line [PROVIDER=auto,guest|auto|lab|kind|guest] [PROFILE=quick|default|full] [OUT=DIR] [ARGS=…]
	@$(if $(filter guest,$(PROVIDER)),,$(SUDO)) bin/plimsoll run --provider '$(PROVIDER)' --profile '$(PROFILE)' $(if $(OUT),--out '$(OUT)') $(ARGS)

.PHONY: test
test: go-version root bin/plimsoll packages $(BINARIES) kind-parts bin/e2e.test bin/ginkgo guest-parts ## set up, then run every test, as root: most of them need a kernel
	@# One package at a time: tests that load rules and measure would disturb each other. Kernels change without
	@# Go noticing, so no result is taken from the cache.
	$(GO) test -p 1 -count 1 -timeout 25m $(TESTFLAGS) $(if $(SUDO),-exec "sudo env PATH=$$PATH CI=$(CI) 'PLIMSOLL_CACHE=$(CACHE)'") ./...

.PHONY: figures
figures: go-version root bin/plimsoll packages $(BINARIES) ## measure the load balancer's own figures, on a quiet machine: hook, connect, round trips, agent beside kube-proxy
	$(GO) test -run '^$$' -bench 'Hook|Sync' -benchtime 40x $(if $(SUDO),-exec "sudo env PATH=$$PATH") ./dataplane/lb
	$(GO) test -run '^$$' -bench 'Connect|RoundTrip' -benchtime 1000x -timeout 30m $(if $(SUDO),-exec "sudo env PATH=$$PATH") ./dataplane/lb
	$(GO) test -run '^$$' -bench Agent -benchtime 1x -timeout 2h $(if $(SUDO),-exec "sudo env PATH=$$PATH") ./bench

.PHONY: accept
accept: go-version bin/plimsoll guest-parts $(BINARIES) ## count instructions in guests, and accept the counts that tests hold later ones to
	@bin/plimsoll accept $(ARGS)

MODES ?= iptables,nftables,ebpf,ipvs
FOCUS ?=
SLOW ?=

.PHONY: e2e
e2e: go-version root bin/plimsoll packages kind-engine node-image e2e-parts ## run Kubernetes' own tests of Services in each mode, on kind [MODES=iptables,nftables,ebpf,ipvs] [FOCUS=REGEXP] [SLOW=1] [OUT=DIR] [ARGS=…]
	@$(SUDO) bin/plimsoll e2e --modes '$(MODES)' $(if $(FOCUS),--focus '$(FOCUS)') $(if $(SLOW),--slow) $(if $(OUT),--out '$(OUT)') $(ARGS)

.PHONY: race
race: go-version root bin/plimsoll ## run the tests of packages that need no kernel under the race detector
	$(INSTALL) --with check
	CGO_ENABLED=1 $(GO) test -race -short -timeout 15m ./results/... ./scenarios ./scenarios/load ./scenarios/meters ./dataplane/agent

.PHONY: build
build: go-version bin/plimsoll $(BINARIES) ## build plimsoll and, once, the Kubernetes under test into bin/

.PHONY: node-image
node-image: go-version root bin/plimsoll ## make a node image for kind from distribution packages and Go modules, without a registry
	$(call make-images,image)

.PHONY: kind-engine
kind-engine: go-version root bin/plimsoll packages ## start a container engine for kind where there is none; plimsoll engine stop ends it
	@$(SUDO) bin/plimsoll engine start

.PHONY: check
check: go-version root bin/plimsoll ## gofmt, vet, staticcheck, actionlint, shellcheck, and that regenerating changes nothing
	$(INSTALL) --with generate,check
	@unformatted=$$("$$($(GO) env GOROOT)/bin/gofmt" -l .); \
	[ -z "$$unformatted" ] || { echo "gofmt -w is wanted on: $$unformatted" >&2; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) tool actionlint
	shellcheck .ci/run clusters/kind/nodeimage/{assemble,sources,root/usr/local/bin/entrypoint,root/usr/local/lib/plimsoll/kubelet-{cgroup,names}}
	@# The work tree is compared with itself, so that a change can be checked before it is committed.
	@sums() { $(GIT) ls-files -z --cached --others --exclude-standard '*_bpfe[lb].*' | xargs -0r sha256sum; }; \
	before=$$(sums); $(MAKE) --no-print-directory generate; after=$$(sums); \
	diff <(echo "$$before") <(echo "$$after") || { echo "generated files were stale; they are fresh now: commit them with the C" >&2; exit 1; }

.PHONY: generate
generate: go-version generate-packages ## compile the BPF C with the pinned clang; commit the objects with the C
	$(GO) generate ./dataplane/...

.PHONY: kubernetes-version
kubernetes-version: go-version ## move go.mod to another Kubernetes: VERSION=v1.36.3
	@[[ '$(VERSION)' == v1.*.* ]] || { echo 'say which: make kubernetes-version VERSION=v1.36.3' >&2; exit 1; }
	@# k8s.io/kubernetes replaces its staging modules with folders of its own, which only counts in the main module:
	@# ours replaces each with the release of the same number.
	@version='$(VERSION)'; staging=v0.$${version#v1.}; \
	theirs=$$($(GO) mod download -json "k8s.io/kubernetes@$$version" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p' || true); \
	[ -n "$$theirs" ] || { echo "no such release: k8s.io/kubernetes@$$version" >&2; exit 1; }; \
	staged=$$(awk '$$2 == "=>" && $$3 ~ /^\.\/staging\// { print $$1 }' "$$theirs"); \
	edits=(-require="k8s.io/kubernetes@$$version" -require="k8s.io/client-go@$$staging"); \
	for module in $$staged; do edits+=(-replace="$$module=$$module@$$staging"); done; \
	for module in $$(awk '$$1 == "replace" && $$2 ~ /^k8s.io\// { print $$2 }' go.mod); do \
	grep -qxF "$$module" <<<"$$staged" || edits+=(-dropreplace="$$module"); done; \
	$(GO) mod edit "$${edits[@]}" -godebug="default=$$(sed -n 's/^godebug default=//p' "$$theirs")"; \
	$(GO) mod tidy
	@echo 'go.mod asks for Kubernetes $(VERSION); now: make check test'

.PHONY: clean
clean: ## remove what runs left behind on this host, and bin/
	@[ ! -x bin/plimsoll ] || $(SUDO) bin/plimsoll clean
	rm -rf bin

# Steps.

.PHONY: go-version
go-version:
	@said=$$($(GO) list -m 2>&1 >/dev/null) || { \
	echo "plimsoll needs Go $$(sed -n 's/^go //p' go.mod) or newer (https://go.dev/doc/install); this one says: $${said//$$'\n'/ }" >&2; exit 1; }

.PHONY: root
root:
	@[ -z "$(SUDO)" ] || command -v sudo >/dev/null || { echo "this needs root, and there is no sudo here: run it as root" >&2; exit 1; }

.PHONY: packages
packages: bin/plimsoll
	$(INSTALL)

# Kubernetes' specs, what runs them, and the images of their pods.
.PHONY: e2e-parts
e2e-parts: bin/e2e.test bin/ginkgo e2e-image

.PHONY: e2e-image
e2e-image: go-version root bin/plimsoll
	$(call make-images,e2e)

# The tests of kind start an engine by themselves, where there is none and one can be had.
.PHONY: kind-parts
kind-parts:
	@$(MAKE) --no-print-directory node-image e2e-image || echo 'there is no node image: the tests of kind will be skipped'

.PHONY: guest-parts
guest-parts: bin/plimsoll
	@$(SUDO) bin/plimsoll doctor --install --with guest || echo 'there is no QEMU for guests: what they would give will be skipped'

# Subtle: the C is sometimes ahead of the Go that uses it, and then plimsoll does not build before this has run. So it is
# built only where the compiler is missing.
.PHONY: generate-packages
generate-packages:
	@if ! type clang-14 llvm-strip-14 >/dev/null 2>&1 || [ ! -e /usr/include/bpf/bpf_helpers.h ]; then \
	$(MAKE) --no-print-directory root bin/plimsoll && $(SUDO) bin/plimsoll doctor --install --with generate; fi

.PHONY: FORCE
FORCE:

# go build knows best what has changed, and takes a second when nothing has.
bin/plimsoll: FORCE
	@version=$$($(GIT) describe --tags --always --dirty 2>/dev/null || echo unknown); \
	commit=$$($(GIT) describe --exclude '*' --always --abbrev=40 --dirty 2>/dev/null || echo unknown); \
	[ -e $@ ] || echo 'building plimsoll (once; a minute or two)'; \
	$(GO) build -trimpath -ldflags "-s -w -X main.version=$$version -X main.commit=$$commit" -o $@ ./bench

# The Kubernetes under test is a line of go.mod: it is built again when go.mod, go.sum or the compiler changed.
bin/.key: FORCE
	@mkdir -p bin; key=$$({ $(GO) env GOVERSION GOOS GOARCH; cat go.mod go.sum; } | sha256sum); \
	[ "$$key" = "$$(cat $@ 2>/dev/null)" ] || echo "$$key" >$@

# A build that finds nothing to do leaves the file's time alone, hence the touch.
bin/kube-apiserver bin/kube-proxy: bin/.key
	@version=$$($(GO) list -m -f '{{.Version}}' k8s.io/kubernetes); IFS=. read -r major minor _ <<<"$${version#v}"; \
	echo "building $(@F) $$version (about two minutes on two processors)"; \
	stamp=k8s.io/component-base/version; \
	$(GO) build -trimpath -ldflags "-s -w -X $$stamp.gitVersion=$$version -X $$stamp.gitMajor=$$major -X $$stamp.gitMinor=$$minor \
	-X $$stamp.gitTreeState=archive -X $$stamp.gitCommit=unknown" -o $@ k8s.io/kubernetes/cmd/$(@F)
	@touch $@

bin/e2e.test: bin/.key $(wildcard scenarios/e2e/*.go scenarios/e2e/specs/*.go)
	@echo "building Kubernetes' specs (a few minutes on two processors)"
	@$(GO) test -c -tags e2e -trimpath -ldflags "-s -w" -o $@ ./scenarios/e2e/specs
	@touch $@

bin/ginkgo: bin/.key
	@$(GO) build -trimpath -ldflags "-s -w" -o $@ github.com/onsi/ginkgo/v2/ginkgo
	@touch $@

bin/etcd: bin/.key
	@echo "building etcd $$($(GO) list -m -f '{{.Version}}' go.etcd.io/etcd/server/v3) (less than a minute)"
	@$(GO) build -trimpath -ldflags "-s -w" -o $@ go.etcd.io/etcd/server/v3
	@touch $@
