"""From numbers to what people read: statistics, pictures, terminal tables, pages."""
