"""OpenBLAS for MLX's CPU backend."""

import logging

import pytest

from server.link import blas


def test_a_library_that_is_found_is_preloaded_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_uses_cpu_wheel", lambda: True)
    monkeypatch.setattr(blas, "find_openblas", lambda: "/lib/libopenblas.so.0")
    assert blas.with_fast_blas({"A": "b"}) == {
        "A": "b",
        "LD_PRELOAD": "/lib/libopenblas.so.0",
        "OPENBLAS_THREAD_TIMEOUT": "4",
    }
    assert blas.with_fast_blas({"LD_PRELOAD": "x.so"})["LD_PRELOAD"] == "x.so:/lib/libopenblas.so.0"
    assert blas.with_fast_blas({"OPENBLAS_THREAD_TIMEOUT": "9"})["OPENBLAS_THREAD_TIMEOUT"] == "9"


def test_a_missing_library_is_told_with_the_package_that_has_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(blas, "_uses_cpu_wheel", lambda: True)
    monkeypatch.setattr(blas, "find_openblas", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert blas.with_fast_blas({"A": "b"}) == {"A": "b"}
    assert "libopenblas0-pthread" in caplog.text


def test_other_backends_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_uses_cpu_wheel", lambda: False)
    assert blas.with_fast_blas({"A": "b"}) == {"A": "b"}
