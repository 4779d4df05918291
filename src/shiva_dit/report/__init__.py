"""Tables of documents, written from records: a number in a document is a number in a record."""
