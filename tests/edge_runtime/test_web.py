"""The live page: what its server gives to whom, and the page itself in a browser where there is one."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edge_runtime import web
from edge_runtime.errors import SinkError, UsageError
from edge_runtime.events import Event
from edge_runtime.listener import Health
from edge_runtime.monitor import Monitor
from edge_runtime.session import Hearing
from edge_runtime.web import MOST_CLIENTS, LivePage

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from browser import CHROMIUM, Browser

TOKEN = "a-token-of-our-own"


def answer(kind: str, start: float, end: float) -> Event:
    return Event(kind, start, end, "joy", 0.75, {"anger": 0.25, "joy": 0.75})


@pytest.fixture
def monitor() -> Monitor:
    hearing = Hearing(2.0, -60.0, -50.0, -61.0, -52.0, False, None)
    health = Health(12.0, 3, 0, 0, 0.0, 0, None, 0.0, 0.01, 0.02, 0.03)
    ear = SimpleNamespace(hearing=lambda: hearing, health=lambda: health, source=SimpleNamespace(name="porch"))
    return Monitor(ear, ("anger", "joy"))


@pytest.fixture
def page(monitor):
    with LivePage(monitor, "0", environment={}) as page:
        yield page


def port_of(url: str) -> int:
    return int(re.search(r":(\d+)/", url)[1])


def get(url: str, path: str = "/", method: str = "GET", host: str | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(url), timeout=30)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    return connection.getresponse()


@contextmanager
def messages(url: str, path: str = "/events"):
    """Give the messages of the stream of events, one after the other."""
    response = get(url, path)
    assert response.status == 200
    with closing(response):
        yield (json.loads(line.removeprefix(b"data: ")) for line in response if line.startswith(b"data: "))


def test_the_page_needs_nothing_from_elsewhere_and_may_load_nothing(page):
    response = get(page.url)
    content = response.read().decode()
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert set(re.findall(r"https?://[^\"' ]+", content)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.findall(r"\b(?:src|srcset|action)=|@import|url\((?!#)", content)
    assert re.findall(r'href="([^"]*)"', content) == ["data:,"]
    policy = dict(part.strip().split(" ", 1) for part in response.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["script-src"].startswith("'sha256-")
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Server"] == "ser-edge"


def test_events_arrive_once_and_who_comes_later_gets_the_last_minutes(page, monitor):
    monitor.note(answer("begin", 0.0, 1.0))
    with messages(page.url) as first:
        now = next(first)
        assert (now["source"], now["labels"], now["level"], now["gate"]) == ("porch", ["anger", "joy"], -60.0, "closed")
        assert now["reason"].startswith("quieter than speech")
        assert now["answer"]["probabilities"] == {"anger": 0.25, "joy": 0.75}
        assert now["health"]["latency_p95"] == 0.02
        assert [entry["event"]["kind"] for entry in now["entries"]] == ["begin"]
        assert next(first)["entries"] == []
        monitor.note(answer("end", 0.0, 1.5))
        monitor.say("mqtt: connection lost")
        entries = next(filter(None, (message["entries"] for message in first)))
        entries += [] if len(entries) == 2 else next(filter(None, (message["entries"] for message in first)))
        assert entries[0]["event"] == answer("end", 0.0, 1.5).to_dict()
        assert entries[0]["number"] == now["entries"][0]["number"]
        assert entries[1]["message"] == "mqtt: connection lost"
        with messages(page.url) as second:
            assert next(second)["entries"] == entries


def test_there_is_nothing_else(page):
    for path in ("/index.html", "/events/", "/../web.py", "/%2e%2e/etc/passwd", "//events"):
        assert get(page.url, path).status == (200 if path == "//events" else 404), path


@pytest.mark.parametrize("method", ["POST", "HEAD", "PUT", "DELETE", "OPTIONS", "BREW"])
def test_nothing_but_get(page, method):
    response = get(page.url, method=method)
    assert (response.status, response.headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:8765", 200),
        ("LOCALHOST", 200),
        ("[::1]:8765", 200),
        ("192.168.1.7:80", 200),
        (socket.gethostname(), 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:8765", 403),
        ("", 403),
        ("[::1", 403),
        ("user@localhost", 200),
    ],
)
def test_a_strangers_name_that_leads_here_is_refused(page, host, status):
    for path in ("/", "/events"):
        assert get(page.url, path, host=host).status == status


@pytest.mark.parametrize(
    "request_line", [b"GET\r\n\r\n", b"GET /\r\n\r\n", b"\x16\x03\x01\x02\r\n\r\n", b"GET / HTTP/9\r\n\r\n"]
)
def test_what_is_no_request_is_refused(page, request_line):
    with socket.create_connection(("127.0.0.1", port_of(page.url)), timeout=30) as client:
        client.sendall(request_line)
        assert b"<html" not in b"".join(iter(lambda: client.recv(65536), b""))
    assert get(page.url).status == 200


# Who may look


def test_this_machine_needs_no_token(page):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", page.url)


def test_others_need_the_token_that_is_in_the_url(monitor):
    with LivePage(monitor, "0.0.0.0:0", environment={}) as page:
        token = re.fullmatch(rf"http://{re.escape(socket.gethostname())}:\d+/\?token=(\S{{32}})", page.url)[1]
        for path in ("/", "/events"):
            assert get(page.url, f"{path}?token={token}").status == 200
            for wrong in ("", "?token=", f"?token={token[:-1]}", "?token=%ff%00", f"?tokens={token}"):
                response = get(page.url, path + wrong)
                assert response.status == 403
                assert b"token" in response.read()
    with LivePage(monitor, "0.0.0.0:0", environment={}) as other:
        assert other.url.rpartition("=")[2] != token


def test_the_token_can_be_ones_own(monitor):
    with LivePage(monitor, "0", environment={"SER_EDGE_WEB_TOKEN": TOKEN}) as page:
        assert page.url.endswith(f"/?token={TOKEN}")
        assert get(page.url).status == 403
        assert get(page.url, f"/?token={TOKEN}").status == 200


@pytest.mark.parametrize("address", ["", "x", "99999", "-1", "1.2.3.4", "[::1", "a:b:c", ":8765"])
def test_an_address_that_cannot_be(monitor, address):
    with pytest.raises(UsageError, match="valid: PORT, HOST:PORT"):
        LivePage(monitor, address)


@pytest.mark.parametrize("token", ["short", "", "with blanks in between"])
def test_a_token_that_cannot_be(monitor, token):
    with pytest.raises(UsageError, match="at least 16 letters"):
        LivePage(monitor, "0", environment={"SER_EDGE_WEB_TOKEN": token})


@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid"])
def test_an_address_that_is_not_ours(monitor, host):
    with pytest.raises(SinkError, match=f"--web {host}:0: .*; choose another address or port"):
        LivePage(monitor, f"{host}:0")


def test_ipv6(monitor):
    try:
        page = LivePage(monitor, "[::1]:0", environment={})
    except SinkError:
        pytest.skip("no IPv6 here")
    with page, socket.create_connection(("::1", port_of(page.url)), timeout=30) as client:
        client.sendall(f"GET / HTTP/1.1\r\nHost: {page.url[7:-1]}\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.0 200")


# Clients that hang


def page_threads() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_clients_that_say_nothing_are_bounded_and_left(page, monkeypatch):
    assert web._Handler.timeout == web.CLIENT_S
    monkeypatch.setattr(web._Handler, "timeout", 2.0)
    silent = [socket.create_connection(("127.0.0.1", port_of(page.url))) for _ in range(2 * MOST_CLIENTS)]
    wait_until(lambda: page_threads() == MOST_CLIENTS)
    wait_until(lambda: page_threads() == 0)
    assert get(page.url).status == 200
    for client in silent:
        client.close()


def test_a_client_that_reads_nothing_holds_up_nobody_and_is_left(page, monitor, monkeypatch):
    monkeypatch.setattr(web._Handler, "timeout", 0.5)
    monkeypatch.setattr(web, "PERIOD_S", 0.01)
    monitor._ear.source.name = 20000 * "porch"
    with socket.create_connection(("127.0.0.1", port_of(page.url))) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with messages(page.url) as others:
            for _ in range(50):
                assert next(others)["gate"] == "closed"
            assert page_threads() == 2
            wait_until(lambda: next(others) and page_threads() == 1)


def test_nothing_is_computed_while_nobody_looks(page, monitor, monkeypatch):
    asked = []
    take = monitor.snapshot
    monkeypatch.setattr(monitor, "snapshot", lambda: asked.append(1) or take())
    time.sleep(0.5)
    assert not asked
    with messages(page.url) as found:
        next(found)
        assert asked
    wait_until(lambda: page_threads() == 0)
    seen = len(asked)
    time.sleep(0.5)
    assert len(asked) == seen


# The command


@contextmanager
def listening(model, *options, **environment):
    """Run ``ser-edge listen`` on samples that the caller writes, and give the process and the page's address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_runtime", "listen", str(model), "-", "--stall", "60", "--web", *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment},
    )  # fmt: skip
    try:
        yield process, re.search(r"page: (\S+)", process.stderr.readline().decode())[1]
    finally:
        process.kill()
        process.communicate()


def pcm(samples: np.ndarray) -> bytes:
    return np.round(32767 * samples).astype("<i2").tobytes()


def test_the_page_says_what_the_lines_say_and_ends_with_the_command(model, speech):
    with listening(model, "0", "--json") as (process, url), messages(url) as found:
        hanging = socket.create_connection(("127.0.0.1", port_of(url)))
        process.stdin.write(pcm(speech(2.0)))
        process.stdin.flush()
        said = json.loads(process.stdout.readline())
        message = next(message for message in found if message["entries"])
        assert message["entries"][0]["event"] == said == message["answer"]
        assert message["gate"] == "open"
        assert message["position"] == 2.0
        process.terminate()
        assert process.wait(10) == 0
        list(found)  # the stream ends
        hanging.close()
        *_, last = process.stdout.read().splitlines()
        assert json.loads(last)["kind"] == "end"


def test_a_port_in_use_is_one_line(model, page):
    port = str(port_of(page.url))
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", "listen", str(model), "-", "--web", port],
        input=b"", capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    expected = f"ser-edge: --web {port}: Address already in use; choose another address or port\n"
    assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b"", expected)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_events_and_messages_have_the_time_of_day_where_the_browser_is(page, monitor, monkeypatch):
    monkeypatch.setattr("edge_runtime.monitor.wall_time", lambda: "2026-01-01T22:59:58.123+01:00")
    monitor.note(replace(answer("end", 0.0, 1.5), wall="2026-01-01T22:00:00.999+01:00"))
    monitor.say("mqtt: connection lost")
    with Browser() as browser:
        browser.live_in("Asia/Tokyo")
        browser.open(page.url)
        browser.wait_for("document.querySelectorAll('#events li').length === 2")
        lines = browser.evaluate(
            "[...document.querySelectorAll('#events li')].map(line => line.innerText.split('\\n'))"
        )
        assert lines == [["06:59:58", "! mqtt: connection lost"], ["06:00:00", "joy 75 %", "1.5 s"]]
        assert browser.complaints == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser(model, recognizer, speech, room):
    with Browser() as browser, listening(model, "0.0.0.0:0", SER_EDGE_WEB_TOKEN=TOKEN) as (process, url):
        browser.open(re.sub(r"//[^:]+", "//127.0.0.1", url))
        browser.wait_for("document.getElementById('connection').textContent === 'connected'")
        browser.wait_for("document.getElementById('gate').textContent === '… waiting'")
        process.stdin.write(pcm(np.concatenate([speech(2.0), room(1.5)])))
        process.stdin.flush()
        browser.wait_for("document.getElementById('age').textContent.endsWith(' s ago')")
        text = browser.evaluate("document.body.innerText")
        label = browser.evaluate("document.getElementById('answer').textContent").split(" ")[0]
        assert f"▸ {label}" in text
        assert all(
            name in text for name in (*recognizer.artifact.labels, "○ gate closed", "quieter than speech", "scores")
        )
        bars = browser.evaluate("[...document.querySelectorAll('#labels .fill')].map(e => parseFloat(e.style.width))")
        assert sum(bars) == pytest.approx(100, abs=0.01)
        assert browser.evaluate("document.querySelectorAll('#timeline rect > title').length") == 1
        assert browser.evaluate("document.getElementById('meter').getAttribute('aria-valuenow')") == "-60"
        looks = []
        for width, scheme in ((390, "light"), (900, "dark")):
            browser.look(width, 900, scheme)
            looks.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert looks[0] != looks[1]
        assert browser.complaints == []
        process.terminate()
        browser.wait_for("document.getElementById('connection').textContent.startsWith('not connected')")
