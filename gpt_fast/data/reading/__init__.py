"""Finding, opening and cutting text: `files` opens what a person names as UTF-8, `rows` reads the text column of
tables, `pipes` copies what can be read only once, `cuts` finds the places where a text can be divided."""
