"""From numbers to what people read: statistics, pictures, tables of a terminal, browser pages."""
