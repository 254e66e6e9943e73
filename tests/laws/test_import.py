"""The laws and the answer need no torch."""

import subprocess
import sys


def test_does_not_import_torch():
    code = "import towtank.laws, towtank.report.answer, towtank.report.verification, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
