"""The Hub: what is there, what comes from there, what goes there. The only caller of its client.

```
failures             the client's errors as ours: what happened to which repo or file, what to do
client               one Hub: reading JSON, pages and parts of files; what the client says
listing              a repo as the Hub describes it, read as untrusted data
discover             which files a repo holds at a commit, and which adapters those are
cache                downloads into huggingface_hub's own cache, checked against their checksums
pull  offline  base  adapters, what of them is cached, base models
remote  sync         adapters that are indexed without being downloaded
publishable  push    what may be published; one atomic commit
```

Nothing here imports torch. The client is imported by these modules, so import them late.
"""
