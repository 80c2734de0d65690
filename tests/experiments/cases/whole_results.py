"""A results folder with a little of everything, some of it damaged, foreign or hostile."""

import json
from pathlib import Path

from PIL import Image

from tests.experiments.cases.handwritten_records import (
    HIT_1,
    HIT_2,
    HIT_3,
    HIT_4,
    MISS,
    SCALE,
    TASK,
    manifest,
    write_run,
)

OTHER_TASK = "dlrm-criteo"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> ${7*7} {{ 7*7 }} & 'quoted' \"too\""

VERDICTS = f"""id,place,claim,paper,ours,scale,dataset,seeds,verdict,why,optimizers,records
one,Table 1,NG+ needs 40 epochs,40,"3 against 5 (0.600×)",tiny,Fashion-MNIST,3,reproduced,\
"paired t-test, p = 0.04","ngplus, sgd",\
{TASK}/tiny/runs/ngplus-seed1.jsonl {TASK}/tiny/runs/sgd-seed1.jsonl
two,"section 2.4, (13)",K-FAC's direction,(13),0.6 as printed,theory,synthetic,1,not reproduced,\
wrong as printed,,theory/errata.csv
three,Figure 5,The training loss is lower,curves,below in 8 of 12,small,flights,2,inconclusive,2 seeds in common,,
four,Table 2,The batch of 4096 takes 12.8k iterations,12.8k,,,,,not run,needs the paper's hardware,,
"""
TUNING = """optimizer,trial,ended,lr,damping,seed,split,epochs,loss,top1,best_top1
sgd,1,complete,0.1,,0,validation,4,0.5,0.80,0.81
sgd,0,pruned,0.01,,0,validation,2,0.9,0.60,0.61
ngplus,0,complete,0.05,1.0,0,validation,4,0.4,0.85,0.86
ngplus,1,diverged,3.0,0.1,0,validation,1,,,
"""
SENSITIVITY = """grid,ended,lr,damping,update_every,seed,split,epochs,loss,top1,best_top1
lr-damping,finished,0.1,10,,0,validation,4,1.0,0.5,0.6
lr-damping,finished,0.1,2,,0,validation,4,1.0,0.5,0.7
lr-damping,diverged,0.02,10,,0,validation,1,,0.1,
lr-damping,finished,0.02,2,,0,validation,4,1.0,0.5,0.75
update_every,finished,,,24,0,validation,4,1.0,0.5,0.65
update_every,finished,,,6,0,validation,4,1.0,0.5,0.55
"""
ERRATA = """place,measure,printed,corrected,margin,tolerance,printed_is_wrong,corrected_is_right
(11),relative error,0.41,9.7e-17,0.05,1e-10,True,True
"""
STEPS = """model,device,threads,rounds,optimizer,interval,usual_over_sgd,every_10_over_sgd,why_not,peak_memory_mb
resnet50 8,a processor,2,3,sgd,500,1.0,1.01,,1300
resnet50 8,a processor,2,3,ngplus,500,1.02,1.33,,1400
resnet50 8,a processor,2,3,kfac (asdfghjkl),500,1.1,2.02,,2000
resnet50 8,a processor,2,3,shampoo,500,,,cannot train it,
"""


def whole(results: Path) -> Path:
    """Two tasks, and one file of each kind."""
    for seed, metrics in enumerate([HIT_1, HIT_2, HIT_2], 1):
        for task in (TASK, OTHER_TASK):
            write_run(results, "ngplus", seed, metrics, task=task, seconds_per_epoch=3.0)
    for seed, metrics in enumerate([HIT_3, HIT_4, MISS], 1):
        for task in (TASK, OTHER_TASK):
            write_run(results, "sgd", seed, metrics, task=task)
    write_run(results, "ngplus-adam", 1, HIT_4)
    put(results / "verdicts.csv", VERDICTS)
    put(results / TASK / SCALE / "tuning.csv", TUNING)
    put(results / TASK / SCALE / "sensitivity.csv", SENSITIVITY)
    put(results / "theory" / "errata.csv", ERRATA)
    put(results / "theory" / "figure1" / "gaussian.csv", "n,difference\n10,0.3\n")
    Image.new("RGB", (60, 40), "white").save(results / "theory" / "figure1" / "figure1.png")
    put(results / "bench" / "steps-resnet50-cpu.csv", STEPS)
    return results


def spoilt(results: Path) -> Path:
    """The same with records that are damaged, foreign, unfinished, and full of markup."""
    whole(results)
    runs = results / TASK / SCALE / "runs"
    put(runs / "junk-seed1.jsonl", "junk\n")
    put(runs / "binary-seed1.jsonl", "\x00\x01\n")
    put(runs / "cut-seed1.jsonl", json.dumps(manifest("cut", 1))[:40])
    put(runs / "foreign-seed1.jsonl", json.dumps(manifest("foreign", 1, task="another")) + "\n")
    write_run(results, "unfinished", 1, HIT_1, end=None)
    put(results / TASK / SCALE / "tuning.csv", "optimizer,lr\nsgd,0.1\n")
    put(results / "bench" / "torn.csv", 'a,b\n"1,2\n3,4,5\n')
    put(results / "theory" / "figure1" / "broken.png", "no image")
    hostile_dataset = manifest("sgd", 1)["dataset"] | {"name": HOSTILE}
    for name in ("sgd", "ngplus"):
        write_run(
            results, name, 1, HIT_2, task="schnet-qm9", dataset=hostile_dataset, device=HOSTILE, versions={HOSTILE: "1"}
        )
    write_run(results, "sgd", 1, HIT_2, folder="<b>bold", task="<b>bold")
    put(
        results / "verdicts.csv",
        VERDICTS + f'five,"{HOSTILE.replace(chr(34), chr(34) * 2)}",claim,1,2,,,,maybe,why,,\n',
    )
    return results


def put(path: Path, text: str) -> None:
    """Write a file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
