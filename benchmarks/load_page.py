"""The page on serving, docs/serving.md, from the figures of load.py."""

from __future__ import annotations

import math
import statistics
from typing import Any

from pages import folded, line, wrapped

#: What the kinds of service in the results are called on the page.
KINDS = {"adaptive": "ten views or two (the default)", "two replicas": "two replicas, ten views or two"}
#: Cameras, and faces per second of each, for the arithmetic.
CAMPUS = ((20, 0.5), (200, 0.5), (2000, 0.5))


def median(rounds: list[dict[str, Any]], key: str) -> float:
    """Return the median of a figure over the rounds."""
    return statistics.median(row[key] for row in rounds)


def spread(values: list[float]) -> str:
    """Return the median, and the lowest and highest round."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} – {max(values):.1f})"


def short_table(rates: dict[str, Any]) -> list[str]:
    """Return rate and latency of one replica for each number of clients."""
    lines = [
        line("clients", "faces / s", "median latency, ms", "99th percentile of latency, ms", "voted with two views"),
        "| ---: |" + " ---: |" * 4,
    ]
    for clients, rounds in rates["services"]["adaptive"].items():
        rate = spread([row["faces_per_second"] for row in rounds])
        times = [f"{median(rounds, key):.0f}" for key in ("p50_ms", "p99_ms")]
        lines.append(line(clients, rate, *times, f"{median(rounds, 'two_views_share'):.0%}"))
    return lines


def per_core(rates: dict[str, Any]) -> dict[int, float]:
    """Return the faces per second of a busy replica, with ten views and with two."""
    services = rates["services"]
    return {
        10: median(services["always ten views"]["16"], "faces_per_second"),
        2: median(services["adaptive"]["32"], "faces_per_second"),
    }


def loop_table(rates: dict[str, Any]) -> list[str]:
    """Return the rates of the plain loop and of the services."""
    lines = [line("what runs", "faces / s"), "| --- | ---: |"]
    lines += [line(f"plain loop, {name}", spread(values)) for name, values in rates["loop"].items()]
    for name, clients in rates["services"].items():
        for count in ("1", "16", "32"):
            rate = spread([row["faces_per_second"] for row in clients[count]])
            lines.append(line(f"service, {KINDS.get(name, name)}, {count} client{'s' * (count != '1')}", rate))
    return lines


def overhead(rates: dict[str, Any]) -> str:
    """Return what the service costs beside a loop, in words."""
    loop = {name: statistics.median(values) for name, values in rates["loop"].items()}
    one = median(rates["services"]["always ten views"]["1"], "faces_per_second")
    rate, two = per_core(rates), median(rates["services"]["two replicas"]["32"], "faces_per_second")
    return (
        f"A plain loop runs the same network in one process, without the service. With ten views only (`--busy` out of "
        f"reach), a single client gets {one:.1f} faces a second, where a plain loop over single faces reaches "
        f"{loop['10 views, batch 1']:.1f}; 16 clients get {rate[10]:.1f}, where a loop over batches of 16 reaches "
        f"{loop['10 views, batch 16']:.1f}. With two views, 32 clients get {rate[2]:.1f}, and the loop over batches of "
        f"16 reaches {loop['2 views, batch 16']:.1f}. The clients{' and other work' * bool(beside(rates))} ran on "
        f"the same two cores, where two replicas reached {two:.1f}: **how the rate grows with the number of cores was "
        f"not measured.**"
    )


def campus(rates: dict[str, Any]) -> list[str]:
    """Return the cores for some numbers of cameras."""
    rate = per_core(rates)
    lines = [
        line("cameras", "faces / s each", "faces / s", "cores, ten views", "cores, two views"),
        "| ---: |" + " ---: |" * 4,
    ]
    for cameras, each in CAMPUS:
        faces = cameras * each
        lines.append(line(f"{cameras:,}", f"{each}", f"{faces:g}", *(f"{math.ceil(faces / rate[n])}" for n in (10, 2))))
    return lines


def million(rates: dict[str, Any]) -> str:
    """Return how long a million faces take."""
    rate = statistics.median(rates["loop"]["10 views, batch 16"])
    return (
        f"A million faces on one core: 1,000,000 ÷ {rate:.0f} a second (the plain loop above, batches of 16) = "
        f"{1e6 / rate / 3600:.0f} hours. This is arithmetic: no run of that size was made."
    )


def measured(part: dict[str, Any]) -> str:
    """Return where and when a part was measured."""
    versions = ", ".join(f"{name} {number}" for name, number in part["versions"].items())
    return f"{part['machine']}; {versions}; commit {part['commit']}, {part['date']}"


def beside(part: dict[str, Any]) -> str:
    """Return that other work ran while a part was measured, if it did."""
    return ", with other work running on the machine" if part.get("load_before", 9) > 0.5 else ""


def detecting(stored: dict[str, Any]) -> str:
    """Return what finding the faces costs."""
    if "detected" not in stored:
        return "This is for cropped faces only: finding faces (`?detect=1`) takes extra time, which was not measured."
    found = stored["detected"]
    rate = {name: spread([row["faces_per_second"] for row in found[name]["8"]]) for name in ("photograph", "face")}
    name = {"Cascade": "OpenCV's cascade", "Mtcnn": "MTCNN"}[found["detector"]]
    return (
        f"This is for cropped faces. Where the service finds them (`?detect=1`, {name}), a photograph of 512×512 with "
        f"one face takes longer: eight clients got {rate['photograph']} a second, and {rate['face']} with the face "
        f"alone, in turn, ten views{beside(found)}."
    )


def soak_words(soak: dict[str, Any]) -> str:
    """Return what happened to the memory."""
    memory, counts = soak["memory"], soak["counts"]

    def mean(kind: str, rows: list[dict[str, float]]) -> float:
        return statistics.mean(row[kind] for row in rows)

    quarter = max(len(memory) // 4, 1)
    grown = {
        kind: (mean(kind, memory[quarter : 2 * quarter]), mean(kind, memory[-quarter:]))
        for kind in ("replica", "proxy")
    }
    right = counts["right"]
    others = sum(n for name, n in counts.items() if name.startswith("wrong"))
    odd = sum(n for name, n in counts.items() if name.startswith("hostile"))
    answered = counts.get("hostile, answered", 0)
    sizes = "; ".join(
        f"of the {kind} {memory[0][kind]:.0f} MiB at the start, {early:.0f} in the second quarter and {late:.0f} in "
        f"the last"
        for kind, (early, late) in grown.items()
    )
    return (
        f"**{soak['minutes']:g} minutes** with {soak['clients']} clients: {right:,} right answers to a known face, "
        f"{others} wrong or failed, and {answered:,} of {odd:,} hostile requests answered with 200 or 4xx, on a "
        f"machine that was busy with other work. Resident memory {sizes}."
    )


def killed_words(killed: dict[str, Any]) -> str:
    """Return what happened when the replica was killed."""
    failed = sum(killed["failed"].values())
    kinds = ", ".join(
        f"{n} without an answer" if status == "0" else f"{n} with status {status}"
        for status, n in killed["failed"].items()
    )
    first = killed["first_right_answer_after_s"]
    return (
        f"**The only replica was killed** while {killed['clients']} clients were sending requests and retrying any "
        f"that failed: of {killed['requests']:,} requests, {killed['right']:,} got the right answer, "
        f"{killed['wrong']} a wrong one, and {failed} failed{f' ({kinds})' if kinds else ''}. The first right answer "
        f"came {first:.0f} s after the kill. A second replica should keep answering in the meantime; that was not "
        f"measured."
    )


def hostile_words(hostile: dict[str, Any]) -> str:
    """Return how hostile input was answered."""
    kinds = ", ".join(f"{n:,} got {status}" for status, n in hostile["statuses"].items())
    known = hostile["known"]
    wrong = sum(n for name, n in known.items() if name != "right")
    grown = hostile["memory_after"]["replica"] - hostile["memory_before"]["replica"]
    failed = hostile.get("failed", len(hostile["bad"]))
    process = "still the same" if hostile["same_replica"] else "another"
    return (
        f"**{hostile['inputs']:,} hostile requests** (random bytes; truncated, bit-flipped and concatenated JPEG, PNG, "
        f"WebP, GIF, BMP and TIFF; false sizes; broken forms; wrong content types): {kinds}. Answers that were "
        f"neither valid nor a one-sentence refusal: {failed}. A known face was sent in between: "
        f"{known['right']:,} right answers, {wrong} wrong or failed. At the end the replica was {process} process, and "
        f"used {grown:.0f} MiB more memory."
    )


def page(stored: dict[str, Any]) -> str:
    """Return docs/serving.md."""
    rates = stored["rates"]
    rate = per_core(rates)
    lines = ["# Serving", ""]
    lines += wrapped(f"""
        **What to do: plan one core for every {rate[10]:.0f} faces a second, and let the vote fall back to two views
        when more arrive; the same core then handles {rate[2]:.0f}.** These figures were measured on one kind of machine
        with `examples/fer48/serve.py`, which serves the network in this repository with Ray Serve; measure on yours
        with `python benchmarks/load.py rates`.""")
    lines += ["", *short_table(rates), ""]
    lines += wrapped(f"""
        One replica and one picture of a face per request; each client sends its next request once it has an answer.
        Rates are the median (lowest – highest) of {rates["rounds"]} rounds of {rates["seconds"]:g} s{beside(rates)}.
        {measured(rates)}.""")
    lines += ["", USE.strip(), "", "## How many cores", ""]
    lines += wrapped(f"""
        cameras × faces per second per camera ÷ faces per second per core = cores, rounded up. For example, with
        {rate[10]:.1f} faces a second per core for ten views and {rate[2]:.1f} for two:""")
    lines += ["", *campus(rates), ""]
    lines += [*wrapped(f"{detecting(stored)} {ONE_CORE}"), "", *MACHINES.strip().splitlines()]
    lines += ["", "## Against a plain loop", "", *wrapped(overhead(rates)), ""]
    lines += folded("All rates", loop_table(rates))
    lines += ["## How we tried to break it", ""]
    for part, words in (("hostile", hostile_words), ("killed", killed_words), ("soak", soak_words)):
        if part in stored:
            lines += [*wrapped(f"- {words(stored[part])}", "  ")]
    lines += ["", *MANY.strip().splitlines(), "", *wrapped(million(rates)), "", *REST.strip().splitlines(), ""]
    return "\n".join(lines)


USE = """
```
pip install -e ".[serve]"
python examples/fer48/serve.py                      # one replica; --replicas 8 for eight cores
curl -H "Content-Type: image/jpeg" --data-binary @face.jpg http://127.0.0.1:8000/predict
curl -H "Content-Type: image/jpeg" --data-binary @photo.jpg "http://127.0.0.1:8000/predict?detect=1"
curl -F pictures=@one.jpg -F pictures=@two.jpg http://127.0.0.1:8000/predict
```

The answer, shortened:

```json
{"model": "FER2013-76e58554071a",
 "faces": [{"picture": 0, "box": null, "class": "happy", "probability": 0.9017, "agreement": 1.0,
            "views": 10, "probabilities": {"angry": 0.0186, "...": 0.0}}],
 "problems": []}
```

- **`probability`** is calibrated with the temperature given in the network's model card, which was fitted to
  votes of ten views.
- **`views`** is ten. It drops to two once a replica has at least `--busy` requests, and returns to ten at `--calm`
  or fewer.
- **`model`** changes with the weights: it ends with the start of their SHA-256.
- **A batch** is a form with up to 64 files. Files that cannot be read are listed in `problems`; if no file can be
  read, the status is 400.
- **Bad input** gets a 4xx and `{"error": "one sentence"}`. Bodies over 16 MiB and pictures over 25 megapixels are
  refused before anything is decoded.
- **When the queue is full** (`--queue`), a request gets a 503 at once; the client should wait before it tries again.
- **Health**: `GET /-/healthz`. `GET /` describes the network and the limits.
- **Metrics** for Prometheus: `http://127.0.0.1:8090/metrics` (`--metrics-port`): `ray_cropvote_faces` by number of
  views, `ray_cropvote_refused` by status, `ray_cropvote_waiting`, `ray_cropvote_batch_size`,
  `ray_cropvote_batch_seconds`, and Ray Serve's own metrics.
"""

ONE_CORE = """
A replica runs the network in one thread and decodes pictures in another; replicas share nothing, and the table assumes
that each core adds as much as the first. Leave a core for Ray's proxy, and headroom for peaks: near the full rate the
queue is always long. Ray's default is to run replicas at a low priority (nice 15); `serve.py` runs them at normal
priority unless `RAY_worker_niceness` is set. With `--address`, set `RAY_worker_niceness=0` where you start Ray.
"""

MACHINES = """
To use more than one machine, run `ray start --head` on one and `ray start --address=...` on the others, then
`serve.py --address`; every machine needs a copy of the repository and the weights. Ray spreads the replicas over the
machines; its HTTP proxy runs on the first one unless Serve's proxy location says otherwise. We ran `--address` against
a cluster of one machine only: **more machines, the rate of one proxy, GPUs and a camera's video stream were not
measured.**
"""

MANY = """
## Many pictures at once

`examples/fer48/predict_many.py` cuts the work into parts, each of which becomes one Parquet file, written whole or
not at all. If it is started again after an interruption, it does only the missing parts, and the files are the
same, byte for byte (a test kills a run and its worker). Only a batch of pictures and 4,096 rows are in memory at a
time.
"""

REST = """
## Before others can reach it

- The service listens on this machine only. It does not check passwords, encrypt, or limit clients: put a reverse
  proxy in front before you set `--host`, and have the proxy limit the size of request bodies.
  Ray's proxy reads a request's body into memory, whatever its size, while the request waits for a replica; the 16 MiB
  limit above is checked only by the replica.
- Ray runs any code that is sent to its own ports. On a single machine they listen on 127.0.0.1, except for one
  port per replica: Ray has no setting for its address. Ray 2.60 requires a token on these ports
  (`~/.ray/auth_token`, written at the first start). Don't set `RAY_AUTH_MODE=disabled`, and have a
  firewall block every port except the service's. On a cluster, set `RAY_AUTH_MODE=token`.
- Ray's usage statistics and dashboard are off. Ray keeps logs below `/tmp/ray`; requests are not logged.
- A predicted class is what annotators would say a face shows, not what the person feels. Read the model card,
  `examples/fer48/weights/MODEL_CARD.md`, before you use it.
"""
