# SPDX-License-Identifier: Apache-2.0
"""Serve a trained model: OpenAI's chat API, and a page that also shows which experts a picture's patches go to."""
