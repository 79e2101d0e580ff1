# SPDX-License-Identifier: Apache-2.0
"""Other projects' names for multi-scale deformable attention, one small file per project.

Importing this package imports none of them, and no other project: `docs/drop-in.md` has the line to
add for each. Whatever is replaced in another project is restored by the handle that was returned.

    from vitadapter_ops.compat.transformers import patch_transformers
    with patch_transformers():
        outputs = model(**inputs)
"""
