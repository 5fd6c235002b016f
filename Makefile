# Each target for users sets the environment up first, which takes no time once it is done.
ACTIVATE = . .venv/bin/activate &&
ROOMS = configs rewards rollout pipeline jobs
LONGEST = tests/jobs tests/pipeline tests/rollout tests/rewards/test_pool.py tests/rewards/test_guard.py

.PHONY: setup demo test types fast-tests test-slow docs

setup:
	@./setup.sh $(EXTRA)

demo: setup
	@$(ACTIVATE) alignyard run demo

test: setup
	$(ACTIVATE) ruff check $(ROOMS) tests
	$(ACTIVATE) ruff format --check $(ROOMS) tests
	$(ACTIVATE) lint-imports
	@$(MAKE) --no-print-directory -j 2 types fast-tests

# What takes long of `test`, side by side.
types:
	$(ACTIVATE) pyright

# What takes longest comes first, so that both processes end together.
fast-tests:
	$(ACTIVATE) pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(LONGEST) tests

test-slow: setup
	$(ACTIVATE) pytest -m slow

docs: setup
	$(ACTIVATE) python -m configs.reference docs/configs.md
