"""Translation of what users read on the console and on pages.

Here belong the catalogues (`zh_CN.po`), the extraction of messages from the sources, and the function that translates a
finished text. The texts of the messages do not: they stay in English where they are raised.
"""
