# Two commands matter: `make demo` and `make test`. Both make .venv and install on their first run only.
VENV  ?= .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BIN   := PATH="$(abspath $(VENV))/bin:$$PATH"
export MPLBACKEND ?= agg

.PHONY: demo test bench lab docs prepare results clean help
help:            ## show this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*##/ -/'

$(STAMP): settings.ini setup.py pyproject.toml
	@bash scripts/install.sh $(VENV)
	@touch $@

demo: $(STAMP)   ## pretrain on real photographs (about 4 minutes on 2 cores), then show what was learnt
	@$(BIN) ssl_patch demo --overwrite

test: $(STAMP)   ## every check: exported modules, clean notebooks, lint, notebooks, pytest
	@$(BIN) bash scripts/test.sh

bench: $(STAMP)  ## time everything beside torchvision, kornia and lightly (under 20 minutes on 2 cores); records in runs/speed
	@$(PY) -m uv pip install -q --python $(PY) -e '.[bench]' 2>/dev/null || $(PY) -m pip install -q --disable-pip-version-check -e '.[bench]' || echo 'kornia and lightly cannot be installed: left out'
	@$(PY) scripts/bench.py all

lab: $(STAMP)    ## open the notebooks in JupyterLab
	@MPLBACKEND= $(VENV)/bin/jupyter lab nbs

prepare: $(STAMP) ## after editing notebooks: clean them, export the package, write README.md
	@$(BIN) nbdev_clean
	@$(BIN) nbdev_export
	@$(PY) scripts/readme.py

docs:            ## render the notebooks as a site (not built yet)
	@echo "The rendered site is still to come; the notebooks in nbs/ are the documentation." && exit 1

clean:           ## remove the virtual environment
	rm -rf $(VENV)
