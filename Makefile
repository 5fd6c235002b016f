# Each target for users sets the environment up first, which takes no time once it is done.
ACTIVATE = . .venv/bin/activate &&
ROOMS = configs rewards rollout pipeline jobs

.PHONY: setup demo test types fast fast-tests test-slow test-faults soak test-portable test-peers test-sinks test-s3 test-gpu demo-table demo-two-nodes wheel docs site lock-gpu

setup:
	@./setup.sh $(EXTRA)

demo: setup
	@$(ACTIVATE) alignyard run demo

test: setup
	$(ACTIVATE) ruff check alignyard.py $(ROOMS) tests
	$(ACTIVATE) ruff format --check alignyard.py $(ROOMS) tests
	$(ACTIVATE) lint-imports
	@$(MAKE) --no-print-directory -j 2 types fast-tests

# What takes long of `test`, side by side; types are checked where tests wait.
types:
	$(ACTIVATE) nice pyright

fast-tests:
	$(ACTIVATE) pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

# After a change to one room, in under a minute: make fast ROOM=pipeline/gates runs the tests that import from it, but for
# those that start engines or training ranks.
fast: setup
	@$(ACTIVATE) ruff check $(ROOM) && ruff format --check $(ROOM)
	@$(ACTIVATE) pytest -m "not slow and not engine and not ranks" -n 2 tests/test_layout.py \
		$$(grep -rlE "(from|import) $(subst /,.,$(ROOM))\b" tests --include='test_*.py')

test-slow: setup
	$(ACTIVATE) pytest -m slow

# Faults injected into a small run, which resumes from each: an hour on two cores; writes the table of docs/faults.md.
# ONLY="raylet clock" injects those whose names contain a word. Some need root.
test-faults: setup
	@$(ACTIVATE) python -m tests.faults.run runs/test-faults $(ONLY)

# STEPS=500 of that run with a random fault every 20, and what its processes hold meanwhile.
soak: setup
	@$(ACTIVATE) python -m tests.faults.soak runs/soak $(or $(STEPS),500)

# The README's table: the demo at five seeds, an hour on two cores.
demo-table: setup
	@$(ACTIVATE) alignyard bench demo --steps 5

# Two nodes that this machine imitates, beside one: SFT, GRPO and a gate (docs/clusters.md, also for other scenarios:
# SCENARIO=refused).
demo-two-nodes: setup
	@$(ACTIVATE) python -m tests.nodes.run $(SCENARIO)

# As on other machines: make test-portable ONLY="avx2 one_core" TESTS="tests/rewards tests/jobs"; tests/portable.sh says more.
test-portable: setup
	@TESTS="$(TESTS)" tests/portable.sh $(ONLY)

# Our losses beside those of TRL, verl and OpenRLHF, a minute; writes the table of docs/algorithm.md. The peers are installed
# without their dependencies, behind this environment's own packages (tests/peers/peers.py).
PEERS = trl==1.16.0 verl==0.9.1 openrlhf==0.11.2
test-peers: setup
	@[ "$$(cat .venv-peers/versions 2>/dev/null)" = "$(PEERS)" ] || { rm -rf .venv-peers && $(ACTIVATE) \
		python -m pip install --quiet --no-deps --target .venv-peers $(PEERS) && echo "$(PEERS)" > .venv-peers/versions; }
	$(ACTIVATE) pytest tests/peers

# Weights & Biases, MLflow, trackio and SwanLab by their own libraries, offline, two minutes. Their versions of other packages
# stand before this environment's, in an environment of their own, since three of them refuse versions of constraints.txt.
SINKS = wandb==0.31.0 mlflow-skinny==3.17.2 trackio==0.43.0 swanlab==0.10.3
SINKS_PYTHON = .venv-sinks/bin/python
PACKAGES = import sysconfig; print(sysconfig.get_path("purelib"))
test-sinks: setup
	@[ "$$(cat .venv-sinks/versions 2>/dev/null)" = "$(SINKS)" ] || { rm -rf .venv-sinks && \
		.venv/bin/python -m venv .venv-sinks && \
		.venv/bin/python -c '$(PACKAGES)' > "$$($(SINKS_PYTHON) -c '$(PACKAGES)')/project.pth" && \
		$(SINKS_PYTHON) -m pip install --quiet $(SINKS) && echo "$(SINKS)" > .venv-sinks/versions; }
	$(SINKS_PYTHON) -m pytest tests/sinks

# Data, model and results in S3, against a server on this machine. s3fs has to be of fsspec's release.
S3 = s3fs==2026.9.0 moto[server]==5.2.2
test-s3: setup
	@[ "$$(cat .venv-s3/versions 2>/dev/null)" = "$(S3)" ] || { rm -rf .venv-s3 && .venv/bin/python -m venv .venv-s3 && \
		.venv/bin/python -c '$(PACKAGES)' > "$$(.venv-s3/bin/python -c '$(PACKAGES)')/project.pth" && \
		.venv-s3/bin/python -m pip install --quiet $(S3) && echo "$(S3)" > .venv-s3/versions; }
	PYTHONPATH=$$PWD .venv-s3/bin/python -m pytest tests/s3

# On one GPU, eight minutes: what stand-ins can only imitate (docs/gpu.md). ONLY="states attention" runs some checks, CPU=1
# tests the script without a GPU. Not after setup: half of it runs with torch, transformers and deepspeed alone.
test-gpu:
	@$$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3) -m tests.gpu.run $(if $(CPU),--cpu) $(ONLY)

# The package for pip, in dist/. A commit with a tag is a release: the tag has to be the version. Without build/, into which
# setuptools copies modules and from which it never removes one.
wheel: setup
	@tag=$$(git describe --tags --exact-match 2>/dev/null || true); version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml); \
		[ -z "$$tag" ] || [ "$$tag" = "v$$version" ] || { echo "tag $$tag, but pyproject.toml says $$version" >&2; exit 1; }
	@rm -rf build/lib build/bdist.* && $(ACTIVATE) python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . && rm -rf build/lib build/bdist.* *.egg-info && ls dist

docs: setup
	$(ACTIVATE) python -m configs.documentation docs/configs.md

# The site, in build/site; a broken link fails it, but with --quiet MkDocs counts no warning. Its generator lies apart.
SITE := $(shell sed -n 's/^docs = \["\(.*\)"\].*/\1/p' pyproject.toml)
site: setup
	@[ "$$(cat .venv-docs/version 2>/dev/null)" = "$(SITE)" ] || { rm -rf .venv-docs && $(ACTIVATE) \
		python -m pip install --quiet --target .venv-docs -c constraints.txt "$(SITE)" && echo "$(SITE)" > .venv-docs/version; }
	@$(ACTIVATE) python -m configs.site build/pages && PYTHONPATH=.venv-docs NO_MKDOCS_2_WARNING=1 python -m mkdocs build --clean
	@echo "build/site/index.html"

# Needs uv. Versions of constraints.txt are kept where CUDA's packages allow it.
lock-gpu:
	grep -viE '^(torch|triton|vllm|intel)' constraints.txt > requirements-gpu.txt
	uv pip compile pyproject.toml --extra gpu --extra gguf --extra dev --python-version 3.11 --no-annotate --quiet \
		--python-platform x86_64-manylinux_2_28 --custom-compile-command "make lock-gpu" -o requirements-gpu.txt
