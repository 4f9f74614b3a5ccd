"""setuptools' PEP 517 backend, plus one thing: LLMKERN_CUDA=on without an nvcc asks for one from
PyPI as a build requirement. Every other hook is setuptools' own."""

import cuda_build
from setuptools.build_meta import *  # noqa: F403
from setuptools.build_meta import (
    get_requires_for_build_editable as _for_editable,
)
from setuptools.build_meta import (
    get_requires_for_build_wheel as _for_wheel,
)


def _compiler() -> list[str]:
    return list(cuda_build.WHEELS) if cuda_build.mode() == "on" and not cuda_build.find() else []


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return _for_wheel(config_settings) + _compiler()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return _for_editable(config_settings) + _compiler()
