import os
import shutil

import pytest
from safetensors.numpy import save_file

from diffusers_fvg.publishing import privacy
from diffusers_fvg.publishing.privacy import check_nothing_private, has_key


# Put together here, so that no scanner of repositories takes them for keys.
LETTERS, LARGE, DIGITS = "aB3dE6gH9k" * 10, "ABCDEFGH234567QR", "0123456789"
KEYS = {
    "Hugging Face": "hf_" + LETTERS[:34],
    "OpenAI": "sk-" + "proj-" + LETTERS[:40],
    "Anthropic": "sk-" + "ant-api03-" + LETTERS[:40],
    "Stripe": "sk_" + "live_" + LETTERS[:24],
    "bearer": "Authorization: Bearer " + LETTERS[:20],
    "AWS": "AKIA" + LARGE,
    "AWS, for a time": "ASIA" + LARGE,
    "AWS, its secret": "AWS_" + "SECRET_ACCESS_KEY=" + LETTERS[:40],
    "Google": "AIza" + LETTERS[:35],
    "Azure": "AccountName=a;Account" + "Key=" + LETTERS[:86] + "==",
    "GitHub": "ghp_" + LETTERS[:36],
    "GitHub, a server": "ghs_" + LETTERS[:36],
    "GitHub, fine-grained": "github_" + "pat_" + LETTERS[:22] + "_" + LETTERS[:59],
    "GitLab": "glpat-" + LETTERS[:20],
    "Slack": "xoxb-" + DIGITS + "-" + DIGITS + "-" + LETTERS[:24],
    "npm": "npm_" + LETTERS[:36],
    "PyPI": "pypi-" + "AgEIcHlwaS5vcmc" + LETTERS[:60],
    "Replicate": "r8_" + LETTERS[:37],
    "a web token": "eyJ" + LETTERS[:20] + ".eyJ" + LETTERS[:30] + "." + LETTERS[:43],
    "a private key": "-----BEGIN " + "PRIVATE KEY-----",
    "a private key of RSA": "-----BEGIN " + "RSA PRIVATE KEY-----",
    "a private key of OpenSSH": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "a private key of PGP": "-----BEGIN " + "PGP PRIVATE KEY BLOCK-----",
    "an address": "https://somebody:" + "s3cr3tword@example.org/data",
    "a password": "DB_" + "PASSWORD=hunter2hunter2",
    "a password, quoted": 'export MYSQL_ROOT_PASSWORD="' + 'correct-horse-battery"',
    "a password, YAML": "SMTP_" + "PASSWD: tr0ub4dor&3",
    "a password, JSON": '{"REDIS_' + 'PASSWORD": "hunter2hunter2"}',
    "a key of a service": "WANDB_" + "API_KEY=" + LETTERS[:40].lower(),
}
# What explains, what computes, and what other programs write.
NO_KEYS = [
    "export HF_TOKEN=<your token>",
    "export HF_TOKEN=hf_...",
    "hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx and sk-XXXXXXXXXXXXXXXXXXXXXXXX",
    "OPENAI_API_KEY=sk-...",
    "OPENAI_API_KEY=your-key-here",
    "DB_PASSWORD=$PASSWORD_OF_THE_VAULT",
    "DB_PASSWORD=${DB_PASSWORD}",
    "DB_PASSWORD=changeme-now",
    'PASSWORD = os.environ["DB_PASSWORD"]',
    "API_KEY = arguments.api_key",
    "API_KEY=get_the_key()",
    "password=hunter2hunter2 is a sentence about a password",
    '{"PASSWORD": 50256, "SECRET": 50257, "API_KEY=": 123456, "PASSWORD=\\"": 31000}',
    "EOS_TOKEN: <|endoftext|>, PAD_TOKEN=[PAD][PAD][PAD]",
    "a task-oriented-dialogue-system-with-risk-assessment-and-more",
    "disk-based-storage-of-many-small-files-in-one",
    "https://user:password@example.org and https://example.org:8080/a@b",
    "http://127.0.0.1:8000/v1 and mailto:somebody@example.org",
    "-----BEGIN CERTIFICATE----- and -----BEGIN PUBLIC KEY-----",
    "AKIAN, ASIAN and ASIATICLANGUAGESARE18 are words",
    "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "a7f3c9d2b14e5f60718293a4b5c6d7e8f9012345",
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk",
    "A red circle turns blue; the secret: it was blue all along. Token by token the password fades.",
    "eyJhbGciOiJIUzI1NiJ9 alone is a header",
]


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_key_is_known_by_its_shape(key):
    assert has_key(key.encode()) and has_key(f"x = '{key}'\n".encode())


@pytest.mark.parametrize("text", NO_KEYS)
def test_what_is_no_key_is_not_taken_for_one(text):
    assert not has_key(text.encode())


def test_weights_are_not_taken_for_keys():
    assert not has_key(os.urandom(16 << 20))


@pytest.mark.parametrize("key", ["GitHub", "a password", "a private key"])
def test_a_key_in_a_large_file_is_found_wherever_it_lies(key, tmp_path, monkeypatch):
    """Also across the border of two of the parts that a file is read in."""
    monkeypatch.setattr(privacy, "_PART", 1 << 16)
    text, border = KEYS[key].encode(), 1 << 16
    for place in (0, border - len(text) // 2, border - 1, 3 * border - len(text), 5 * border):
        data = bytearray(b" " * (6 * border))
        data[place : place + len(text)] = text
        (tmp_path / "notes.bin").write_bytes(data)
        with pytest.raises(ValueError, match=r"Not pushed: notes.bin \(a key\)"):
            check_nothing_private(tmp_path)
    # Neighbours of a key in a file that holds none.
    (tmp_path / "notes.bin").write_bytes(b" " * (6 * border))
    check_nothing_private(tmp_path)


def test_of_weights_the_header_is_read(tmp_path):
    import numpy as np

    values = np.frombuffer(KEYS["AWS"].encode(), dtype=np.uint8)
    save_file({"a": values}, tmp_path / "a.safetensors")
    check_nothing_private(tmp_path)
    save_file({"a": values}, tmp_path / "a.safetensors", {"source": KEYS["AWS"]})
    with pytest.raises(ValueError, match="a key"):
        check_nothing_private(tmp_path)
    # What only says that it is safetensors has no header of that length, and is read.
    (tmp_path / "a.safetensors").write_text(KEYS["a private key"] * 2)
    with pytest.raises(ValueError, match="a key"):
        check_nothing_private(tmp_path)


def test_a_link_to_a_file_elsewhere_is_not_pushed(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    (tmp_path / "private.txt").write_text("mine")
    (folder / "README.md").symlink_to(tmp_path / "private.txt")
    with pytest.raises(ValueError, match="link to .*private.txt, outside"):
        check_nothing_private(folder)
    # In the Hub's cache every file is a link, to the same repository's.
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.move(tmp_path / "private.txt", snapshot.parents[1] / "blob")
    (snapshot / "README.md").symlink_to(snapshot.parents[1] / "blob")
    check_nothing_private(snapshot)
