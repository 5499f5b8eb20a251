"""The heap keeps what large blocks gave back, unless its user has set it otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from jobs.memory import _ARROW, _POLARS

SIZE = 20 << 20
CODE = f"""
import ctypes, resource
from jobs.memory import keep_pages
keep_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc({SIZE})
    ctypes.memset(block, 1, {SIZE})
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    libc.free(block)
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
@pytest.mark.parametrize(("own", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, False)])
def test_a_block_that_was_given_back_costs_no_page_faults_again(own, kept):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", CODE]
    faults = int(subprocess.run(command, env=plain | own, capture_output=True, text=True, check=True).stdout)
    pages = SIZE // os.sysconf("SC_PAGE_SIZE")
    assert faults < pages / 100 if kept else faults > pages / 2


@pytest.mark.parametrize("own", [{}, {"ARROW_DEFAULT_MEMORY_POOL": "system", "_RJEM_MALLOC_CONF": "narenas:3"}])
def test_the_heaps_of_polars_and_arrow_are_chosen_unless_the_user_did(own):
    code = (
        "import os; from jobs.memory import keep_pages; keep_pages()\n"
        "import pyarrow; print(pyarrow.default_memory_pool().backend_name, os.environ['_RJEM_MALLOC_CONF'])"
    )
    plain = {name: value for name, value in os.environ.items() if name not in (_ARROW, _POLARS)}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=plain | own, capture_output=True, text=True, check=True).stdout.split()
    assert found == (
        ["system", "narenas:3"]
        if own
        else ["jemalloc", f"narenas:{os.cpu_count()},oversize_threshold:0,dirty_decay_ms:10000"]
    )
