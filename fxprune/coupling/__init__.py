"""Couple: which indices of which parameters can only be removed together. Knows nothing of importance.

Words that this package has for itself:

- **unit**: a number; what is removed or stays as one. **class**: units that were merged, by the least of
  them.
- **axis**: one dimension of one tensor, by the name of a parameter or node.
- **label**: the units of one dimension of a value; **over** other dimensions where each of their indices, a
  **row**, has units of its own.
- **state**: a parameter, buffer or constant, whose axes are **open** until they meet something, and then
  follow it.
- **open** of a computed value: along this dimension all entries are alike, so that it follows what it
  meets.
- **frozen**: a unit that stays. **held**: a node around which everything stays.
- **rectangle**: cells in rows, of which equally many must be left in each row that remains.
- **atom**: units that lie in the same rows of every rectangle. **balanced set**: atoms that lose the
  same share of their units.
- **group**: the units that share their axes, decided on together.
- **depends on sizes**: a node that treats dimensions by size or position, and is looked at again when it
  is rewritten.
- **table**: a buffer, a constant, or what is computed from such. Where it stands beside another operand of a
  pointwise operator (:class:`~.units.TableUse`), its units are not merged with the other's at once: when the
  graph is known, it is decided whether the table is narrowed or picked from (:mod:`~.tables`).
- **anchor**, in a check: a unit known to survive; two that meet show that the rewritten graph is wrong.
- **use**: a product that reads channels by an axis of a weight (*consumes*) or makes them (*produces*).
"""
