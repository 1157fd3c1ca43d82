"""How evl-tiny was made: a small image tower trained on rendered, captioned pictures. See docs/evl-tiny.md."""
