"""Names that mean harm to a page, a terminal or a file."""

HOSTILE = (
    '<script>alert("x")</script>',
    "a\" onload='alert(1)' & </title></svg><img src=https://evil.example/x.png>",
    "\u202eright-to-left\x00\x1b[31m \ud800",
    "very-" * 40 + "long",
)
