# make course [PRESET=smoke] [FORCE=1]   install, execute the notebooks, draw figures and report: all of it into runs/
#             [REFRESH=1]                and replace the committed figures, results and report
# make test                              install, then lint, types, unit tests, notebooks and measured numbers
# make weekly                            make test; killed runs twenty times over; Stable Diffusion's full picture size
# make notebooks                         execute the committed notebooks in place
# make site                              the notebooks as a website that needs no network (build/site/index.html), and what
#                                        needs a browser: site and playground in Chromium, where it is installed; with
#                                        Node.js, a page on which MiniSD draws in the browser
# TORCH_INDEX=URL installs PyTorch from that index (https://download.pytorch.org/whl/cpu has no CUDA).
PYTHON ?= python3
PRESET ?= mini
FORCE ?=
REFRESH ?=
TORCH_INDEX ?=

STAMP := .venv/.installed
COURSE := .venv/bin/python -m helpers.cli

.PHONY: course test weekly notebooks site install

course: $(STAMP)
	@$(COURSE) run --preset $(PRESET) $(if $(filter-out 0 no false,$(FORCE)),--force) \
	  $(if $(filter-out 0 no false,$(REFRESH)),--refresh)

test: $(STAMP)
	@$(COURSE) check

weekly: test
	COURSE_KILLS=20 .venv/bin/python -m pytest -q tests/training/test_resume.py
	COURSE_FULL_SIZE=1 .venv/bin/python -m pytest -q tests/repo/test_stable_diffusion.py

notebooks: $(STAMP)
	@$(COURSE) notebooks

site: $(STAMP)
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[site]"
	.venv/bin/python -m helpers.course.site
	.venv/bin/python -m pytest -q tests/browser tests/playground/test_export.py tests/playground/test_page.py

install: $(STAMP)

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing: install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "make: the course needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# PyTorch first and by itself, so that TORCH_INDEX concerns nothing else.
$(STAMP): pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[test]"
	@touch $(STAMP)
