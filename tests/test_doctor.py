from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tlk import doctor
from tlk.doctor import check, usable
from tlk.errors import UnsupportedError
from tlk.kernels import toolchain, tuning
from tlk.kernels.tunable import TUNABLE


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    monkeypatch.setenv("TLK_CACHE_DIR", str(tmp_path / "tlk"))
    tuning.forget()
    yield
    tuning.forget()


@pytest.fixture
def bare(monkeypatch):
    """A machine with neither driver nor GPU."""
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU and all it needs; gives what it says of itself."""
    said = SimpleNamespace(name="NVIDIA H200", sm=90, cuda="13.0")
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: "580.95.05")
    monkeypatch.setattr(torch.version, "cuda", said.cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 4 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: said.name)
    monkeypatch.setattr(doctor, "sm", lambda device: said.sm)
    monkeypatch.setattr(tuning, "sm", lambda device: said.sm)
    monkeypatch.setattr(tuning, "SHIPPED", Path("/nowhere"))
    monkeypatch.setattr(toolchain, "require_c_compiler", lambda: None)
    return said


def found(name):
    return next(c for c in check() if c.name == name)


def test_without_a_gpu_everything_is_usable_and_said(bare):
    checks = check()
    assert usable(checks)
    assert [c.name for c in checks if c.state == "note"] == ["driver", "GPU", "tuned tables"]
    assert str(found("GPU")).startswith("note  GPU             none: every op runs as its PyTorch")


def test_each_kernel_in_gluon_or_why_not(gpu, monkeypatch):
    known = {"flash_attention": None, "scaled": "another Triton"}
    monkeypatch.setattr(doctor, "gluon_kernels", lambda: known)
    assert str(found("flash_attention")) == "ok    flash_attention the kernel in Gluon, for sm_90"
    assert found("scaled").state == "note" and "another Triton" in found("scaled").message
    gpu.sm = 89
    ours, other = (found(name).message for name in known)
    assert ours == "a kernel in Gluon is for sm_90, this is sm_89"
    assert other == f"{ours}; with this Triton: another Triton"
    assert usable(check())


def test_without_a_gpu_a_missing_compiler_is_a_note(bare, monkeypatch):
    def missing():
        raise UnsupportedError("Triton needs a C compiler")

    monkeypatch.setattr(toolchain, "require_c_compiler", missing)
    monkeypatch.setattr(toolchain, "ptxas_version", lambda: None)
    assert found("C compiler").state == found("ptxas").state == "note" and usable(check())


def test_a_complete_gpu_machine_is_usable(gpu):
    checks = check()
    assert usable(checks)
    assert found("GPU").message == "NVIDIA H200, sm_90, 3.0 of 4.0 GiB free"
    assert found("driver").message == "580.95.05, torch is built for CUDA 13.0"
    assert "release" in found("ptxas").message


def test_a_torch_without_cuda_is_a_fault(bare, monkeypatch):
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: "580.95.05")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert found("driver").state == "fault" and "without CUDA" in found("driver").message
    assert not usable(check())


def test_a_driver_too_old_for_torch_is_a_fault(bare, monkeypatch):
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: "470.1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert found("driver").state == "fault" and "update the driver" in found("driver").message


def test_a_gpu_older_than_turing_is_a_fault(gpu):
    gpu.sm = 70
    assert found("GPU").state == "fault" and "need sm_75" in found("GPU").message


def test_a_missing_compiler_says_what_to_install(gpu, monkeypatch):
    def refuse():
        raise UnsupportedError("apt install gcc")

    monkeypatch.setattr(toolchain, "require_c_compiler", refuse)
    assert found("C compiler") == doctor.Check("C compiler", "fault", "apt install gcc")


def test_a_missing_ptxas_is_a_fault(gpu, monkeypatch):
    monkeypatch.setattr(toolchain, "ptxas_version", lambda: None)
    assert found("ptxas").state == "fault"


def test_a_missing_package_is_named(bare, monkeypatch):
    def version(package):
        if package == "triton":
            raise doctor.PackageNotFoundError
        return "1"

    monkeypatch.setattr(doctor, "version", version)
    assert found("versions").message == "triton is not installed: pip install triton"


NOT = "heuristic for sm_90, not measured"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Write a table of one entry: `table("matmul", device, shipped=…)`."""
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(doctor, "TUNABLE", {op: TUNABLE[op] for op in ("matmul", "norm_linear")})

    def write(op, device="NVIDIA H200", version=None, shipped=False):
        version = TUNABLE[op].version if version is None else version
        entry = tuning.Entry(version, device, "bfloat16", (8, 8), 0, {"backend": "cublas"})
        tuning.record(tuning.table_path(op, 90, shipped), [entry])

    return write


def test_no_table_is_said_of_every_op(gpu, table):
    assert found("tuned tables") == doctor.Check(
        "tuned tables", "note", f"{NOT}: matmul, norm_linear"
    )
    gpu.sm = 89
    assert found("tuned tables").message.startswith("heuristic for sm_89, not measured: matmul")


def test_every_tunable_op_is_told(gpu):
    assert found("tuned tables").message.endswith(", ".join(TUNABLE))


def test_tables_are_told_by_where_they_come_from(gpu, table):
    table("matmul", shipped=True)
    message = f"shipped table for this device: matmul; {NOT}: norm_linear"
    assert found("tuned tables") == doctor.Check("tuned tables", "note", message)
    table("norm_linear")
    message = "shipped table for this device: matmul; user cache: norm_linear"
    assert found("tuned tables") == doctor.Check("tuned tables", "ok", message)
    table("matmul")
    assert found("tuned tables").message == "user cache: matmul, norm_linear"


def test_a_table_of_the_same_sm_names_its_gpu(gpu, table):
    for op in ("matmul", "norm_linear"):
        table(op, "NVIDIA H100", shipped=True)
    message = "table for this SM, measured on NVIDIA H100: matmul, norm_linear"
    assert found("tuned tables") == doctor.Check("tuned tables", "note", message)


def test_entries_of_other_versions_count_for_nothing(gpu, table):
    table("matmul", version=0)
    assert found("tuned tables").message == f"{NOT}: matmul, norm_linear"


def test_a_corrupt_table_is_a_fault(gpu, table):
    table("matmul")
    tuning.table_path("matmul", 90).write_text("{")
    tuning.forget()
    assert found("tuned tables").state == "fault"
    assert "matmul.json must be a list" in found("tuned tables").message


def test_a_cache_that_cannot_be_written_is_a_fault(bare, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TLK_CACHE_DIR", str(tmp_path / "file" / "tlk"))
    assert (
        found("tlk's cache").state == "fault"
        and str(tmp_path / "file") in found("tlk's cache").message
    )


def test_a_full_disk_is_noted(bare, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    assert found("tlk's cache").state == "note" and "nearly full" in found("tlk's cache").message


def test_nothing_is_created_by_looking(bare, tmp_path):
    check()
    assert not list(tmp_path.iterdir())


def test_the_drivers_version_is_its_first_line(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor._nvidia_smi() == ""
    monkeypatch.setattr("shutil.which", lambda name: name)
    for code, want in ((0, "580.95.05"), (9, "")):
        answer = SimpleNamespace(returncode=code, stdout="580.95.05\n580.95.05\n")
        monkeypatch.setattr("subprocess.run", lambda *a, answer=answer, **k: answer)
        assert doctor._nvidia_smi() == want
