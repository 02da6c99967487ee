"""Signals before there is anything to save end the process; nothing of it hangs on its way out."""

import ast
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no user signals here")
ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted(
    p.stem for p in ROOT.glob("*.py") if re.match("main_|eval_|visualize|export", p.stem)
)


def run_code(code, **options):
    """A process without torch: (status, screen, seconds)."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        **options,
    )
    return done.returncode, done.stdout, time.monotonic() - start


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_catches_signals_before_it_loads_anything(script):
    first = ast.parse((ROOT / f"{script}.py").read_text()).body[1]  # behind the docstring
    assert isinstance(first, ast.If) and ast.unparse(first.test) == "__name__ == '__main__'"
    assert ast.unparse(first.body) == "from src.run import signals\nsignals.catch()"


def test_catching_signals_loads_no_torch():
    code = "import sys; from src.run import signals; print('torch' in sys.modules)"
    assert run_code(code)[1] == "False\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_is_one_line_and_its_status_even_in_the_middle_of_c(name):
    status, screen, _ = run_code(f"""
        import hashlib, os, signal, threading
        from src.run import signals
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signals.catch()
        threading.Timer(0.2, os.kill, [os.getpid(), signal.{name}]).start()
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)  # minutes in which no handler of Python runs
        """)
    assert (status, screen) == (128 + getattr(signal, name), f"stopped by {name}\n")


def test_what_was_ignored_stays_ignored():
    status, screen, _ = run_code("""
        import os, signal, time
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        from src.run import signals
        signals.catch()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        print("lives")
        """)
    assert (status, screen) == (0, "lives\n")


SAVING = """
    import os, signal, time
    from src.run import signals
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.catch()
    names = []
    for name in signals.STOP_SIGNALS:  # as a StopSignal does
        signal.signal(getattr(signal, name), lambda number, frame: names.append(number))
    for name in {sent}:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.2)
    print(len(names))
    """


@pytest.mark.slow
def test_signals_are_left_to_what_saves_a_run_but_for_the_second_ctrl_c():
    sent = ["SIGTERM", "SIGUSR1", "SIGTERM", "SIGINT"]
    assert run_code(SAVING.format(sent=sent))[:2] == (0, "4\n")
    assert run_code(SAVING.format(sent=[*sent, "SIGINT"]))[:2] == (130, "stopped by SIGINT\n")


def test_a_process_that_hangs_on_its_way_out_ends_with_its_status():
    status, _, seconds = run_code("""
        import sys, threading
        from src.run import signals
        threading.Thread(target=threading.Event().wait).start()  # is waited for
        signals.leave_within(0.3, 3)
        sys.exit(3)
        """)
    assert status == 3 and seconds < 10


def test_workers_are_ended_though_they_are_stopped():
    status, screen, seconds = run_code("""
        import multiprocessing, os, signal, time
        from src.run import signals
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=[60], daemon=True)
        worker.start()
        os.kill(worker.pid, signal.SIGSTOP)
        signals.end_workers()
        """)
    assert (status, screen) == (0, "") and seconds < 10
