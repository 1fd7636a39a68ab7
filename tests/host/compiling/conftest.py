import folder_paths
import pytest


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """What is kept for the next start is in a folder of the test's own."""
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
