"""Records labels as fast as it can and says which were acknowledged; to be killed, or kept from writing.

Each line on standard output: stream, number and class of an acknowledged label, or "refused" and why.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import service.store.writer
from service.errors import NotReady
from service.store.keys import IdReader
from service.store.labels import NewLabel, Result
from tests.service.journals import Kept, answered

N_THREADS = 4


def main() -> None:
    service.store.writer.RETRY_SECONDS = 0.05
    kept, lock = Kept(Path(sys.argv[1])), threading.Lock()
    reader = IdReader(kept.journal.keys)

    def say(*words: object) -> None:
        with lock:
            sys.stdout.write(" ".join(map(str, words)) + "\n")
            sys.stdout.flush()

    def flood(seed: int) -> None:
        while True:
            with lock:  # a stream is appended to by one thread
                prediction_id = kept.stream.append(answered(seed), 1).decode()
            if not prediction_id:
                continue
            number = int(reader.read([prediction_id])[0, 1])
            label = number % 4
            try:
                (result,) = kept.label([NewLabel(prediction_id, 0, label)])
            except NotReady as error:
                say("refused", error.detail_reason)
            else:
                assert result is Result.RECORDED
                say(kept.stream.row.stream, number, label)

    for seed in range(N_THREADS):
        threading.Thread(target=flood, args=(seed,)).start()


if __name__ == "__main__":
    main()
