"""The code samples of the flatllmcore user document, from user_document_samples.md."""

import re
from pathlib import Path

_FILE = Path(__file__).with_name("user_document_samples.md").read_bytes().decode()  # bytes: line ends count
SAMPLES: dict[str, str] = dict(re.findall(r"^## (.+?)\n\n```python\n(.+?)^```", _FILE, re.M | re.S))
