"""From numbers to what people read: statistics, pictures, tables in a terminal, pages of a browser."""
