# kagami. `make` alone lists the targets.

GO       ?= go
PREFIX   ?= /usr/local
DEPS     ?= yes
FUZZTIME ?= 30s
KEEP     ?=
SEEDS    ?= 2000
SEED     ?= 1
VERSION  := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LINT     := $(GO) tool -modfile=tests/tools/go.mod golangci-lint
MAKEFLAGS += --no-builtin-rules

export GO

.DEFAULT_GOAL := help
.PHONY: help deps build test lint demo bench fuzz sim soak ext4-corpus ext4-soak install clean

help: ## list the targets
	@echo "kagami $(VERSION)"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo "DEPS=no skips the check for Debian packages."

deps: ## install what building and testing need, if it is missing (Debian 12, Go >= 1.26)
ifneq ($(DEPS),no)
	@scripts/deps.sh
endif

build: deps ## build bin/kagami
	$(GO) build -trimpath -buildvcs=false -ldflags '-X main.version=$(VERSION)' -o bin/kagami ./appliance

test: deps ## lint, unit tests with the race detector, end-to-end tests; under 30 min on 2 cores
	@scripts/test.sh

lint: deps ## the linters, and a proof that they hold the package map
	$(LINT) config verify
	$(LINT) run ./...
	scripts/lint-proof.sh

demo: build ## the whole story on one machine: protect, lose the site, fail over; KEEP=1 leaves it running
	$(GO) run ./tests/e2e/demo -kagami bin/kagami $(if $(KEEP),-keep)

bench: deps ## run the benchmarks there are, with memory use
	$(GO) test -run '^$$' -bench . -benchmem $$($(GO) list ./... | grep -v /tests/e2e)

fuzz: deps ## fuzz every target for FUZZTIME (30s)
	FUZZTIME=$(FUZZTIME) scripts/fuzz.sh

sim: deps ## the simulator of two sites, SEEDS=2000 of them from SEED=1 on; a failure prints its shortest history
	$(GO) test -count=1 -timeout 0 -v -run '^TestSeeds$$' ./tests/sim -seeds=$(SEEDS) -seed=$(SEED)

soak: build ## the seeded crash tests for long, with a new seed; ROUNDS=50, SEED=
	scripts/soak.sh

ext4-corpus: deps ## images of ext4 file systems that lost their power, into build/ext4-corpus
	mkdir -p build/ext4-corpus
	EXT4_CORPUS=$(CURDIR)/build/ext4-corpus $(GO) test -count=1 -v -run Corpus ./tests/ext4cap

ext4-soak: deps ## all that is tried of ext4, in full and with a new seed; ROUNDS=1, SEED=
	scripts/ext4-soak.sh

install: build ## install the binary and the systemd unit under PREFIX (/usr/local)
	install -D -m 0755 bin/kagami $(DESTDIR)$(PREFIX)/bin/kagami
	sed 's|@PREFIX@|$(PREFIX)|' scripts/kagami.service > bin/kagami.service
	install -D -m 0644 bin/kagami.service $(DESTDIR)$(PREFIX)/lib/systemd/system/kagami.service

clean: ## remove what was built
	rm -rf bin build
