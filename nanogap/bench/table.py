"""What the bench tells people of its JSON document: a table, and what pruning saves."""

PLACE = """\
{weights} on {machine}, {dtype}, {threads} threads, {millions:.0f} million parameters, \
{new_tokens} new tokens; medians of {rounds} rounds
the limits here: {copy_gb_s:.3g} GB/s copied, {matmul_tflop_s:.3g} TFLOP/s in products
milliseconds   tokens  vision  prefill 1st token  a pass   to box  with drafts  KV MB \
prefill TFLOP/s    pass GB/s"""
BOTH = ("{prune:14} {visual_tokens:6g} {vision_ms:7.1f} {prefill_ms:8.1f} {first_token_ms:9.1f} "
        "{pass_ms:7.2f} {box_ms:8.1f}")                    # the columns that both sides have
OURS = BOTH + (" {drafted_box_ms:8.1f} {drafted_passes:3.0f} {kv_mb:6.1f} {prefill_tflop_s:9.3g} "
               "{prefill_share:5.0%} {decode_gb_s:6.3g} {decode_share:5.0%}")
RATIOS = ("{prune:14} {visual_tokens:6g} {vision_ms:7.2f}          {first_token_ms:9.2f} "
          "{pass_ms:7.2f} {box_ms:8.2f} {drafted_box_ms:8.2f}")
TOGETHER = ("ground_all, {number} questions about one picture, {prune} {keep}: "
            "{ground_all_per_s:.3g} answers a second, one by one {one_by_one_per_s:.3g}; "
            "{faster:.2f} times faster")
FIRST_USE = ("{who}: loaded in {load_s:.2f} s{over}; peak memory {peak_over_weights:.2f} of the "
             "weights' {megabytes:.0f} MB")
SUMMARY = """\
Pruning to {visual_tokens:g} tokens makes prefill {prefill_ms:.1f} times faster and the cache \
{kv_bytes:.1f} times smaller.
It does little for the vision tower ({vision_ms:.2f}), which sees all patches, and for a pass of \
the decoder ({pass_ms:.2f}), which reads all weights."""


def print_table(d: dict) -> None:
    """Print the document of `nanogap.bench.measure`."""
    dtype = d["dtype"] + ", packed" * d["packed"]
    about = {"dtype": dtype, "machine": d["gpu"] or d["processor"],
             "millions": d["parameters"] / 1e6}
    print(PLACE.format_map(d | about))
    for row in d["runs"]:
        print(OURS.format_map(row | {"kv_mb": row["kv_bytes"] / 2 ** 20}))
    asked = d["questions"]
    faster = asked["ground_all_per_s"] / asked["one_by_one_per_s"]
    print(TOGETHER.format_map(asked | {"faster": faster}))
    if d["theirs"]:
        seen = {"prune": "transformers", "visual_tokens": d["runs"][0]["visual_tokens"]}
        print(BOTH.format_map(d["theirs"] | seen))
        print("times faster than transformers, which sees all tokens:")
        for row in d["runs"]:
            print(RATIOS.format_map(row | row["theirs_over_this"]))
    for who in ("ours", "theirs"):
        if d[who]:
            longer = d[who]["load_over_read"]
            over = f", {longer:.2f} times as long as to read the bytes" if longer else ""
            megabytes = d[who]["weight_bytes"] / 1e6
            print(FIRST_USE.format_map(d[who] | {"who": who, "over": over, "megabytes": megabytes}))
    fewest = min(d["runs"], key=lambda row: row["visual_tokens"])
    print(SUMMARY.format_map(fewest | fewest["full_over_this"]))
