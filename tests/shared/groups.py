"""Which tests go to one worker, because they share what they made."""

import re
from pathlib import Path

LONG = ("study", "test_browser", "test_ranks", "test_survival")  # groups that run studies or kill trainings


def group_of(test: str) -> str:
    """The group of a test: its study, else its file."""
    file = test.partition("::")[0]
    study = re.search(r"test_study_(\d\d)\w*\.py::|test_all_studies\.py::\w+\[(\d\d)\b", test)
    return f"study {study[1] or study[2]}" if study else Path(file).stem
