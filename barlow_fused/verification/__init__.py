"""Whether the fused kernels are right on this machine's GPU, and where they are the fastest: found out once, recorded.

Compilers, drivers and GPUs differ, and a kernel that is right on one machine can be wrong on another. So ``"auto"``
takes the Triton and CUDA kernels only on a GPU that has a **record**: a file that says which of them gave right numbers
there, and how long each took. ``barlow-fused verify`` makes it.

    key.py      what a record is bound to: the GPU, the driver, the versions, the kernels' sources
    record.py   a record, and what follows from it; files, and the lock that keeps two processes apart
    checks.py   what is checked of one backend, dtype and route
    ranks.py    the same of its operations on one rank's part of a batch
    guard.py    memory around every tensor that a call allocates, looked at afterwards
    speed.py    the backends timed against each other
    child.py    the process in which kernels run, so that one that crashes or hangs takes nothing else with it
    verify.py   starts such processes, says what ended them, and writes the record
    table.py    a record as text; command.py, the command line
    ensure.py   has a record made before work begins

A call reads ``record.py`` and ``key.py`` alone.
"""
