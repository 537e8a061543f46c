"""Finding, opening and cutting text.

`files` opens as UTF-8 the sources that a user names. `rows` reads the text column of tables. `pipes` copies sources
that can be read only once. `cuts` finds the places where a text can be divided.
"""
