"""From notebooks to the report: what they show, how they are executed, and the PDF."""
