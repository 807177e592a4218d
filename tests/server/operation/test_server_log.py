"""The log: what its lines look like, and that its faults are nobody else's."""

import json
import logging
import os
import subprocess
import sys
import threading

import pytest

from interlace.config import load_settings
from interlace.errors import ConfigError
from interlace.server.logs import ServerLog

logger = logging.getLogger("interlace.test")


@pytest.fixture(autouse=True)
def levels():
    """The log sets the levels of loggers for good: it is made for a process of its own."""
    names = ("interlace", "uvicorn.error")
    before = [logging.getLogger(name).level for name in names]
    yield
    for name, level in zip(names, before, strict=True):
        logging.getLogger(name).setLevel(level)


def loaded(**server):
    return load_settings({"server": server}, env={})


def test_text_lines(capfd):
    log = ServerLog(loaded())
    logger.info("one %d", 1)
    logger.debug("unseen")
    log.close()
    text = capfd.readouterr().err
    assert text.endswith("INFO interlace.test: one 1\n")
    assert text.count("\n") == 1


def test_everything_is_json_the_engine_process_and_foreign_noise_included(capfd):
    log = ServerLog(loaded(log_format="json"))
    logger.info("two\nlines", extra={"fields": {"request_id": "mine"}})
    try:
        raise ValueError("inside")
    except ValueError:
        logger.exception("it failed")
    said = "import logging; logging.basicConfig(format='%(levelname)s %(name)s (engine): %(message)s');"
    subprocess.run([sys.executable, "-c", said + "logging.getLogger('interlace.engine').error('from the child')"])
    os.write(2, b"noise of a library\n")
    log.close()
    entries = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    by_message = {entry["message"]: entry for entry in entries}
    assert by_message["two\nlines"]["request_id"] == "mine"
    assert by_message["two\nlines"]["time"].endswith("+00:00")
    assert "ValueError: inside" in by_message["it failed"]["error"]
    child = by_message["from the child"]
    assert (child["level"], child["logger"]) == ("ERROR", "interlace.engine")
    assert by_message["noise of a library"]["logger"] == "stderr"


def test_stderr_is_given_back(capfd):
    ServerLog(loaded(log_format="json")).close()
    os.write(2, b"plain\n")
    assert capfd.readouterr().err == "plain\n"


def test_the_file_gets_the_same_lines(tmp_path, capfd):
    path = tmp_path / "server.log"
    log = ServerLog(loaded(log_file=str(path)))
    logger.info("for both")
    log.close()
    assert path.read_text() == capfd.readouterr().err
    assert "for both" in path.read_text()


def test_a_file_that_vanishes_or_is_rotated_is_made_again(tmp_path, capfd):
    path = tmp_path / "server.log"
    log = ServerLog(loaded(log_file=str(path)))
    logger.info("first")
    wait_for(lambda: "first" in path.read_text())
    path.rename(tmp_path / "server.log.1")
    logger.info("second")
    wait_for(lambda: path.exists() and "second" in path.read_text())
    path.unlink()
    logger.info("third")
    log.close()
    assert "third" in path.read_text()
    assert "cannot be written" not in capfd.readouterr().err


def test_a_folder_that_vanishes_is_reported_once_and_when_it_is_back(tmp_path, capfd):
    folder = tmp_path / "logs"
    folder.mkdir()
    path = folder / "server.log"
    log = ServerLog(loaded(log_file=str(path)))
    path.unlink()
    folder.rmdir()
    log_lines_one_by_one(5)
    folder.mkdir()
    logger.info("back")
    wait_for(lambda: path.exists())
    log.close()
    text = capfd.readouterr().err
    assert text.count("cannot be written: No such file or directory; serving goes on") == 1
    assert text.count("can be written again") == 1
    assert text.count("line ") == 5


def test_a_full_disk_is_reported_once(capfd):
    log = ServerLog(loaded(log_file="/dev/full"))
    log_lines_one_by_one(20)
    log.close()
    text = capfd.readouterr().err
    assert text.count("No space left on device") == 1
    assert text.count("line ") == 20


def test_a_file_that_cannot_be_opened_is_an_error_at_the_start(tmp_path):
    path = tmp_path / "missing" / "server.log"
    with pytest.raises(ConfigError) as caught:
        ServerLog(loaded(log_file=str(path)))
    assert f"server.log_file = '{path}' (constructor) cannot be opened: No such file" in str(caught.value)


def test_a_reader_that_stalls_holds_up_nobody(monkeypatch, capfd):
    """Lines beyond what may be pending are dropped and counted."""
    monkeypatch.setattr("interlace.server.logs.MAX_PENDING", 100)
    stalled, write = threading.Event(), os.write
    entered = threading.Event()

    def slow(descriptor, data):
        if threading.current_thread().name == "interlace-log":
            entered.set()
            assert stalled.wait(30)
        return write(descriptor, data)

    monkeypatch.setattr("interlace.server.logs.os.write", slow)
    log = ServerLog(loaded())
    logger.info("line")
    assert entered.wait(30)
    for _ in range(1000):
        logger.info("line")  # does not wait
    stalled.set()
    wait_for_drop = threading.Thread(target=log.close)
    wait_for_drop.start()
    wait_for_drop.join(30)
    text = capfd.readouterr().err
    assert text.count("INFO interlace.test: line") == 101
    assert "900 lines of the log were dropped" in text


def log_lines_one_by_one(count):
    """Each in a write of its own."""
    for i in range(count):
        logger.info("line %d", i)
        wait_for(lambda: not pending())


def pending():
    [handler] = logging.getLogger().handlers
    return not handler._put_line.__self__._lines.empty()


def wait_for(condition):
    pause = threading.Event()
    for _ in range(1500):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it never happened")
