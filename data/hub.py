"""Downloads published GPT-2 token shards from the Hugging Face hub, and goes on where it stopped.

`hf_hub_download` of huggingface_hub 2 throws a half file away when its process ends, so the bytes
are fetched here over that library's own session: it knows the endpoint (HF_ENDPOINT), the token
and the proxies. A file grows as `NAME.<tag>.part` and gets its name once it is whole and checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.progress import Progress
from data.shards import InputError, read_header, sha256

DATASETS = {  # name: (repository on the hub, prefix of its files)
    "fineweb-edu": ("kjj0/finewebedu10B-gpt2", "finewebedu"),
    "fineweb": ("kjj0/fineweb10B-gpt2", "fineweb"),
}
PROGRESS_BYTES = 1 << 20  # a try that got this far counts as progress
AGAIN = "run the same command again: it goes on where it stopped"
SHA256 = re.compile("[0-9a-f]{64}")
T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a download is waited for, in seconds."""

    stall_s: float = 30.0  # without one byte: the connection counts as stalled
    tries: int = 6  # in a row without progress
    wait_s: float = 1.0  # before the second try; doubles up to longest_s
    longest_s: float = 300.0  # a server that asks for more is not waited for


@dataclass(frozen=True)
class Remote:
    """A file on the hub: where it is and what it must be."""

    name: str
    url: str  # of one commit, so that the file cannot change on the way
    size: int  # bytes
    sha256: str | None  # large files have their digest as ETag
    tag: str  # tells a part of this very file from a part of another version


class _Interrupted(Exception):
    """A failure that may pass; `wait_s`: what the server asks for, None if it does not say."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


def shard_names(dataset: str, train_shards: int) -> list[str]:
    """File names of the validation shard and the first `train_shards` training shards."""
    prefix = DATASETS[dataset][1]
    train = [f"{prefix}_train_{i:06d}.bin" for i in range(1, train_shards + 1)]
    return [f"{prefix}_val_000000.bin", *train]


def fetch_shards(
    dataset: str,
    train_shards: int,
    folder: Path,
    progress: Progress,
    patience: Patience = Patience(),
) -> None:
    """Makes `folder` hold the validation shard and the first training shards of a data set.

    Whole files stay as they are, without a look at the network. InputError, in one sentence, if a
    file cannot be had; what was fetched before stays, a half file as `.part`.
    """
    missing = []
    for name in shard_names(dataset, train_shards):
        path = folder / name
        if not path.exists():
            missing.append(name)
            continue
        try:
            read_header(path)
            progress.say(f"{name} is here already")
        except InputError as e:
            progress.say(f"{e}; fetching it again")
            missing.append(name)
    if not missing:
        return
    hub = Hub(DATASETS[dataset][0], patience)
    downloader = Downloader(hub, folder, progress)
    remotes = [downloader.look_up(name) for name in missing]  # a wrong N fails before gigabytes
    downloader.expect(remotes)
    for remote in remotes:
        downloader.fetch(remote)


class Hub:
    """One data set repository on the hub, as huggingface_hub sees it.

    What may pass is raised as _Interrupted, what will stay as InputError.
    """

    def __init__(self, repo: str, patience: Patience):
        try:
            import huggingface_hub.errors
            import huggingface_hub.utils
        except ImportError:
            raise InputError(
                "downloading needs huggingface_hub: pip install huggingface-hub"
            ) from None
        self.library, self.repo, self.patience = huggingface_hub, repo, patience
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        if not self.endpoint.startswith(("http://", "https://")):
            raise InputError(f"HF_ENDPOINT is {self.endpoint!r}: it must start with https://")
        # The library moved from httpx to httpx2: take the one that its session is made of.
        session = huggingface_hub.utils.get_session()
        self.http = sys.modules[type(session).__module__.partition(".")[0]]

    def look_up(self, name: str) -> Remote:
        """Size, digest and commit of a file, by one HEAD request."""
        with self._failures(name):
            try:
                meta = self.library.get_hf_file_metadata(
                    self._url(name), timeout=self.patience.stall_s
                )
            except (self.http.ConnectError, self.http.ProxyError) as e:  # offline: do not wait
                raise InputError(
                    f"cannot reach {self.endpoint} ({e}): without a network, tokenise text that "
                    "you have (data text PATH...), or set HF_ENDPOINT to a mirror"
                ) from None
        if not meta.size or not meta.commit_hash:
            raise InputError(f"{self.endpoint} does not answer as a hub: check HF_ENDPOINT")
        etag = meta.etag or str(meta.size)
        return Remote(
            name,
            self._url(name, meta.commit_hash),
            meta.size,
            etag if SHA256.fullmatch(etag) else None,
            hashlib.sha256(etag.encode()).hexdigest()[:12],
        )

    @contextlib.contextmanager
    def opened(self, remote: Remote, start: int) -> Iterator:
        """The answer to a GET of a file from byte `start`: status 206, or 200 for all of it."""
        headers = {**self.library.utils.build_hf_headers(), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        options = {"timeout": self.patience.stall_s, "follow_redirects": True}
        session = self.library.utils.get_session()
        with (
            self._failures(remote.name),
            session.stream("GET", remote.url, headers=headers, **options) as response,
        ):
            if response.status_code not in (200, 206):
                raise self._refusal(remote.name, response)
            yield response

    def _url(self, name: str, revision: str = "main") -> str:
        where = {"repo_type": "dataset", "endpoint": self.endpoint, "revision": revision}
        return self.library.hf_hub_url(self.repo, name, **where)

    @contextlib.contextmanager
    def _failures(self, name: str) -> Iterator[None]:
        """Tells the library's errors in our words."""
        try:
            yield
        except self.library.errors.OfflineModeIsEnabled:
            raise InputError("HF_HUB_OFFLINE is set: unset it to download") from None
        except self.library.errors.HfHubHTTPError as e:
            raise self._refusal(name, e.response) from None
        except self.http.TimeoutException:
            raise _Interrupted(f"nothing came for {self.patience.stall_s:g} s") from None
        except self.http.RequestError as e:
            raise _Interrupted(f"the connection was cut ({type(e).__name__})") from None

    def _refusal(self, name: str, response) -> Exception:
        """What an HTTP status means."""
        status = response.status_code
        if status == 404:
            return InputError(f"{self.repo} has no {name} (404): ask for fewer --shards")
        if status in (401, 403):
            return InputError(
                f"the hub does not give {name} to you ({status}): log in with `hf auth login`"
            )
        value = response.headers.get("Retry-After", "").strip()
        wait = float(value) if value.isdecimal() else None
        if status == 429:
            return _Interrupted("the hub has too many requests (429)", wait)
        if status in (408, 416) or status >= 500:
            return _Interrupted(f"the hub answers {status}", wait)
        return InputError(f"the hub refuses {name} with status {status}: check HF_ENDPOINT")


class Downloader:
    """Fetches files of one repository into a folder."""

    def __init__(self, hub: Hub, folder: Path, progress: Progress):
        self.hub, self.folder, self.progress = hub, folder, progress
        self.before = 0  # bytes of the files that are whole

    def look_up(self, name: str) -> Remote:
        """`Hub.look_up`, patiently."""
        return self._patiently(name, lambda: self.hub.look_up(name))

    def expect(self, remotes: list[Remote]) -> None:
        """Announces the files to come; InputError if the folder cannot hold them."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"cannot make the folder {self.folder}: {e.strerror}") from None
        parts = [self._part(remote) for remote in remotes]
        have = sum(part.stat().st_size for part in parts if part.exists())
        total = sum(remote.size for remote in remotes)
        free = shutil.disk_usage(self.folder).free
        if total - have > free:
            raise InputError(
                f"{self.folder} has {free / 1e9:.1f} GB free and needs {(total - have) / 1e9:.1f} "
                "more: give fewer --shards or another --out"
            )
        found = f", {have / 1e6:,.1f} MB of them in parts here" if have else ""
        self.progress.say(f"fetching {len(remotes)} files, {total / 1e6:,.1f} MB{found}")
        self.progress.expect(total, have)

    def fetch(self, remote: Remote) -> Path:
        """Downloads what is missing of a file, checks it, gives it its name."""
        part = self._part(remote)
        for stale in self.folder.glob(f"{remote.name}.*.part"):
            if stale != part:  # of another version of the file
                stale.unlink()
        self._patiently(remote.name, lambda: self._download(remote, part), part)
        self._check(remote, part)
        final = self.folder / remote.name
        part.replace(final)
        self.before += remote.size
        self.progress.say(f"{remote.name} is whole: {remote.size / 1e6:,.1f} MB")
        return final

    def _part(self, remote: Remote) -> Path:
        return self.folder / f"{remote.name}.{remote.tag}.part"

    def _download(self, remote: Remote, part: Path) -> None:
        """One try: appends to the part until it is as long as the file."""
        have = part.stat().st_size if part.exists() else 0
        if have > remote.size:
            part.unlink()
            have = 0
        if have == remote.size:
            return
        with self.hub.opened(remote, have) as response:
            if response.status_code == 200:
                have = 0  # the server takes no ranges: all over again
            try:
                self._append(remote, part, have, response)
            except OSError as e:
                raise InputError(f"cannot write {part}: {e.strerror}") from None
        size = part.stat().st_size
        if size < remote.size:
            raise _Interrupted(f"it ends after {size:,} of {remote.size:,} bytes")

    def _append(self, remote: Remote, part: Path, have: int, response) -> None:
        with part.open("r+b" if have else "wb") as f:
            f.seek(have)
            for data in response.iter_bytes():
                have += len(data)
                if have > remote.size:
                    part.unlink()
                    raise InputError(
                        f"the hub says that {remote.name} has {remote.size:,} bytes and sends more"
                        ": try again later, or check HF_ENDPOINT"
                    )
                f.write(data)
                self.progress.update(self.before + have)
            f.flush()
            os.fsync(f.fileno())

    def _check(self, remote: Remote, part: Path) -> None:
        """The part is the file that the hub has, and a token shard; else it is removed."""
        if remote.sha256 and sha256(part) != remote.sha256:
            part.unlink()
            raise InputError(
                f"{remote.name} arrived damaged (its sha256 is not the hub's) and was removed: "
                "run the same command again"
            )
        try:
            read_header(part)
        except InputError as e:
            part.unlink()
            reason = str(e).removeprefix(f"{part} ")
            raise InputError(
                f"what {self.hub.endpoint} gave as {remote.name} {reason}; it was removed: "
                "check HF_ENDPOINT"
            ) from None

    def _patiently(self, name: str, attempt: Callable[[], T], part: Path | None = None) -> T:
        """Tries until it works, or often enough without progress; progress is growth of `part`."""
        patience = self.hub.patience
        tries, wait, size = 0, patience.wait_s, 0
        while True:
            before = size
            try:
                return attempt()
            except _Interrupted as e:
                size = part.stat().st_size if part and part.exists() else 0
                if size >= before + PROGRESS_BYTES:
                    tries, wait = 0, patience.wait_s
                tries += 1
                pause = wait if e.wait_s is None else e.wait_s
                if pause > patience.longest_s:
                    raise InputError(
                        f"{name}: {e} and asks to wait {pause:.0f} s: then {AGAIN}"
                    ) from None
                if tries >= patience.tries:
                    raise InputError(f"{name}: {e}, {tries} tries in a row: {AGAIN}") from None
                self.progress.say(f"{name}: {e}; going on in {pause:g} s")
                time.sleep(pause)
                wait = min(2 * wait, patience.longest_s)
