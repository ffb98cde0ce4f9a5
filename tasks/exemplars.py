"""Solved examples for few-shot prompts, written for this project: (input, target) texts by kind of task."""

from __future__ import annotations

EXEMPLARS: dict[str, tuple[tuple[str, str], ...]] = {
    "en_de": (
        ("The library opens at nine and closes at six.", "Die Bibliothek öffnet um neun und schließt um sechs."),
        (
            "The council will vote on the new bridge next week.",
            "Der Stadtrat stimmt nächste Woche über die neue Brücke ab.",
        ),
        (
            "After two days of rain, the river had risen by almost a metre.",
            "Nach zwei Tagen Regen war der Fluss um fast einen Meter gestiegen.",
        ),
        (
            "We do not know yet who will pay for the repairs.",
            "Wir wissen noch nicht, wer die Reparaturen bezahlen wird.",
        ),
    ),
    "en_fr": (
        (
            "The library opens at nine and closes at six.",
            "La bibliothèque ouvre à neuf heures et ferme à dix-huit heures.",
        ),
        (
            "The council will vote on the new bridge next week.",
            "Le conseil municipal votera la semaine prochaine sur le nouveau pont.",
        ),
        (
            "After two days of rain, the river had risen by almost a metre.",
            "Après deux jours de pluie, la rivière était montée de près d'un mètre.",
        ),
        ("We do not know yet who will pay for the repairs.", "Nous ne savons pas encore qui paiera les réparations."),
    ),
    "sums": (
        (
            "A baker fills 6 trays with 12 rolls each and sells 50 rolls. How many rolls are left?",
            "The baker makes 6 * 12 = 72 rolls.\nAfter selling 50 there are 72 - 50 = 22 rolls left.\n#### 22",
        ),
        (
            "Ines cycles 15 kilometres on each of 4 days and half as far on the fifth. How far does she cycle in all?",
            "In 4 days she cycles 4 * 15 = 60 kilometres.\n"
            "On the fifth day she cycles 15 / 2 = 7.5 kilometres.\n"
            "Together that is 60 + 7.5 = 67.5 kilometres.\n"
            "#### 67.5",
        ),
        (
            "A ticket costs $8 for adults and $5 for children. What do 2 adults and 3 children pay?",
            "The adults pay 2 * 8 = $16.\nThe children pay 3 * 5 = $15.\nTogether they pay 16 + 15 = $31.\n#### 31",
        ),
        (
            "A tank of 900 litres is one third full. A pump adds 40 litres a minute. In how many minutes is it full?",
            "The tank holds 900 / 3 = 300 litres now.\n"
            "It lacks 900 - 300 = 600 litres.\n"
            "The pump needs 600 / 40 = 15 minutes.\n"
            "#### 15",
        ),
    ),
}
