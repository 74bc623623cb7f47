"""Requests in two legs, where one worker prefills and another decodes: a file for each order of the two."""
