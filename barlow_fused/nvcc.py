"""Where the CUDA compiler is. setup.py, CMakeLists.txt and doctor ask this file, so it imports nothing of the package.

``python barlow_fused/nvcc.py`` prints the compiler's path, or says why there is none that will do.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

OLDEST = (12, 8)  # the first that compiles for sm_100


def find() -> str | None:
    """The first nvcc of: CUDACXX, CUDA_HOME, PATH, the nvidia-cuda-nvcc wheel."""
    candidates = [os.environ.get("CUDACXX")]
    if "CUDA_HOME" in os.environ:
        candidates.append(os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"))
    candidates.append("nvcc")
    wheels = importlib.util.find_spec("nvidia")
    folders = list(wheels.submodule_search_locations or ()) if wheels else []
    folders.append(os.path.join(sysconfig.get_path("purelib"), "nvidia"))  # an isolated build hides it
    candidates += [str(path) for folder in folders for path in sorted(Path(folder).glob("*/bin/nvcc"))]
    return next((path for path in map(shutil.which, filter(None, candidates)) if path), None)


def version(nvcc: str) -> tuple[int, int]:
    """(12, 8) for CUDA 12.8.

    Raises:
        OSError, ValueError: it cannot be run, or does not say.
    """
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        raise ValueError(f"{nvcc} --version does not name a release")
    return int(release[1]), int(release[2])


def why_not(nvcc: str | None) -> str | None:
    """Why ``nvcc``, which ``find`` returned, cannot compile the extension; None when it can."""
    if nvcc is None:
        return "there is no nvcc in CUDACXX, CUDA_HOME, PATH or a wheel (pip install 'cuda-toolkit[nvcc]' has it)"
    try:
        found = version(nvcc)
    except (OSError, ValueError) as error:
        return str(error)
    if found < OLDEST:
        return f"{nvcc} is of CUDA {found[0]}.{found[1]}; {OLDEST[0]}.{OLDEST[1]} or newer is needed"
    return None


if __name__ == "__main__":
    path = find()
    reason = why_not(path)
    if reason is not None:
        sys.exit(reason)
    print(path)
