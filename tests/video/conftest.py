"""What tests of decoding share: the corpus of numbered files, made once."""

import pytest

from tests.support.video_corpus import NumberedFile, make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[NumberedFile]:
    """All files of the corpus."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))
