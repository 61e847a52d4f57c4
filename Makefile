# Two commands matter: `make demo` and `make test`. Both make .venv and install on their first run only.
VENV  ?= .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BIN   := PATH="$(abspath $(VENV))/bin:$$PATH"
export MPLBACKEND ?= agg
# Threads that wait let others have the core: on a busy machine work slows in proportion, not by more.
export OMP_WAIT_POLICY ?= passive

.PHONY: help demo test bench lab docs docs-serve prepare notebooks encoders audit clean
help:            ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/ -/'

$(STAMP): settings.ini setup.py pyproject.toml
	@bash scripts/install.sh $(VENV)
	@touch $@

demo: $(STAMP)   ## pretrain on real photographs (a few minutes on 2 cores), then show what was learnt
	@$(BIN) ssl_patch demo --overwrite

test: $(STAMP)   ## every check: exported modules, clean notebooks, lint, format, notebooks, pytest
	@$(BIN) bash scripts/test.sh

bench: $(STAMP)  ## time everything beside torchvision, kornia and lightly (under 20 minutes on 2 cores); records in runs/speed
	@$(PY) -m uv pip install -q --python $(PY) -e '.[bench]' 2>/dev/null || $(PY) -m pip install -q --disable-pip-version-check -e '.[bench]' || echo 'kornia and lightly cannot be installed: left out'
	@$(PY) scripts/bench.py all

lab: $(STAMP)    ## open the tour in JupyterLab, and all notebooks beside it
	@MPLBACKEND= $(VENV)/bin/jupyter lab nbs/00_tour.ipynb

docs: $(STAMP)   ## write the site, every notebook a page, into _docs, and look at every page of it
	@$(BIN) python scripts/docs.py
	@$(BIN) python scripts/check_site.py

docs-serve: $(STAMP) ## serve what make docs wrote on http://localhost:8000
	@$(PY) scripts/docs.py --serve

prepare: $(STAMP) ## after editing notebooks: format and clean them, export the package, write README.md
	@$(BIN) ruff format -q nbs tests scripts setup.py
	@$(BIN) bash scripts/export.sh

notebooks: $(STAMP) ## run every notebook anew, keep what it shows, then write README.md
	@$(BIN) python scripts/run_notebooks.py

encoders: $(STAMP) ## train the small encoders that come with the package anew
	@$(BIN) python scripts/train_encoders.py

audit: $(STAMP)  ## look up known weaknesses of all that is installed (needs the network; says what it could not look up)
	@$(PY) -m uv tool run -q pip-audit --progress-spinner off --skip-editable --path "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

clean:           ## remove the virtual environment
	rm -rf $(VENV)
