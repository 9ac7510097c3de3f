"""What the tests of all packages stand on: deterministic weights, golden numbers and checks for operators."""

from __future__ import annotations
