"""The machine that a dry run finds: its memory, its speed, its disk."""

from lensjax.select.dry_run.machine import available_memory, free_disk, inspect_machine, matmul_speed


def test_available_memory_is_what_the_system_and_the_control_groups_leave(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 4000 kB\n")
    assert available_memory(proc, groups) == 4000 * 1024
    # Version 2: the limits of the groups around it count too; what could be given up is not used.
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    (groups / "a" / "b").mkdir(parents=True)
    (groups / "a" / "b" / "memory.max").write_text("max\n")
    (groups / "a" / "memory.max").write_text("3000000\n")
    (groups / "a" / "memory.current").write_text("1500000\n")
    (groups / "a" / "memory.stat").write_text("anon 5\ninactive_file 500000\nactive_file 7\n")
    assert available_memory(proc, groups) == 2_000_000
    # Version 1, in a container, where the group's own path is not there.
    (proc / "self" / "cgroup").write_text("4:cpu,memory:/elsewhere/x\n1:cpu:/\n")
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("1000000\n")
    (groups / "memory" / "memory.usage_in_bytes").write_text("400000\n")
    (groups / "memory" / "memory.stat").write_text("total_inactive_file 100000\n")
    assert available_memory(proc, groups) == 700_000
    assert available_memory(tmp_path / "nothing", groups) is None


def test_a_machine_is_described_by_its_own_devices_memory_and_speed():
    machine = inspect_machine("auto")
    assert (machine.platform, machine.devices) == ("cpu", 1)
    assert machine.memory > 0
    assert machine.speed == {"float32": matmul_speed("float32", 1024)}
    assert machine.speed["float32"] > 1e8


def test_disk_is_that_of_the_nearest_directory_that_exists(tmp_path):
    assert free_disk(tmp_path / "not" / "there")[1] == tmp_path.stat().st_dev
