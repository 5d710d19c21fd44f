"""What is asked of a language model, and what is made of its answers.

Requests and answers are files in one format (requests.py), whoever answers: a server (client.py), a
batch program, someone else. captions.py and questions.py write the former and read the latter.
"""
