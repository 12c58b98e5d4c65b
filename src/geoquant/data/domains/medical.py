"""A clinic: visit notes, discharge letters, phone notes, prescriptions, referrals."""

from __future__ import annotations

from geoquant.data.grammar import Domain, Draft, words
from geoquant.data.values import PERSON, number

__all__ = ["MEDICAL"]

# Illness: drugs given against it, each with the milligrams of one dose.
TREATMENTS = {
    "type 2 diabetes": ("metformin 500 850 1000", "glipizide 5 10", "empagliflozin 10 25"),
    "major depression": ("sertraline 50 100 150", "citalopram 20 40", "bupropion 150 300"),
    "bipolar disorder": ("lithium 300 450 600", "quetiapine 100 200 300", "lamotrigine 100 200"),
    "atrial fibrillation": ("apixaban 2.5 5", "warfarin 2 4 5", "bisoprolol 2.5 5 10"),
    "breast cancer": ("tamoxifen 20 40", "anastrozole 1", "capecitabine 500 1000"),
    "epilepsy": ("levetiracetam 500 750 1000", "valproate 500 1000", "carbamazepine 200 400"),
    "opioid dependence": ("methadone 30 60 80", "buprenorphine 8 16 24", "naltrexone 50"),
    "severe asthma": ("prednisone 10 20 40", "montelukast 10", "theophylline 200 300"),
    "chronic migraine": ("topiramate 50 100", "sumatriptan 50 100", "propranolol 80 160"),
    "hepatitis C": ("sofosbuvir 400", "ribavirin 600 1000"),
    "heart failure": ("ramipril 2.5 5 10", "furosemide 20 40 80", "spironolactone 25 50"),
    "schizophrenia": ("clozapine 100 200 350", "risperidone 2 4 6", "olanzapine 10 15 20"),
    "systemic lupus": ("hydroxychloroquine 200 400", "azathioprine 50 100", "prednisone 5 10 20"),
    "alcohol use disorder": ("disulfiram 250 500", "acamprosate 333 666", "naltrexone 50"),
    "HIV infection": ("dolutegravir 50", "tenofovir 245 300", "lamivudine 150 300"),
    "multiple sclerosis": ("dimethyl fumarate 120 240", "baclofen 10 20", "fingolimod 0.5"),
    "Parkinson's disease": ("levodopa 100 200 250", "ropinirole 4 8", "rasagiline 1"),
    "rheumatoid arthritis": ("methotrexate 7.5 10 15", "leflunomide 10 20", "sulfasalazine 500 1000"),
    "Crohn's disease": ("budesonide 3 9", "mesalazine 800 1200", "azathioprine 50 100"),
    "an underactive thyroid": ("levothyroxine 0.05 0.075 0.1",),
    "gout": ("allopurinol 100 300", "colchicine 0.5 1"),
    "osteoporosis": ("alendronate 10 70", "raloxifene 60"),
    "chronic kidney disease": ("losartan 50 100", "sevelamer 800", "torasemide 10 20"),
    "post-traumatic stress disorder": ("prazosin 1 2 5", "paroxetine 20 40", "venlafaxine 75 150"),
    "ulcerative colitis": ("tofacitinib 5 10", "mesalazine 1200 2400"),
    "tuberculosis": ("isoniazid 300", "rifampicin 450 600", "ethambutol 800 1200"),
    "restless legs syndrome": ("pramipexole 0.25 0.5", "gabapentin 300 600"),
    "a deep vein thrombosis": ("rivaroxaban 15 20", "dabigatran 110 150"),
    "attention deficit disorder": ("methylphenidate 10 18 36", "atomoxetine 40 80"),
    "polycystic ovary syndrome": ("metformin 500 850", "spironolactone 50 100"),
}


def medication(draft: Draft) -> str:
    """A drug against this record's illness and its dose."""
    *drug, doses = _split(draft.rng.choice(TREATMENTS[draft.fact("diagnosis")]))
    return f"{' '.join(drug)} {draft.rng.choice(doses)} mg"


def _split(entry: str) -> list:
    """Words of the drug, then the list of its doses."""
    parts = entry.split()
    doses = [part for part in parts if part[0].isdigit()]
    return [*parts[: len(parts) - len(doses)], doses]


RULES = {
    "record": (
        "Visit of «date». Patient «name», born «birth», record «id». «complaint» «finding» «assessment» «plan»",
        "«name» (record «id») came in on «date» «with». «finding» «assessment» «plan» «contact»",
        "Discharge letter\nPatient: «name», born «birth»\nAdmitted: «date»\nDiagnosis: «diagnosis»\n«course» «plan»",
        "Dear colleague, thank you for seeing «name», born «birth», who «history». «finding» «plan» «contact»",
        "Phone note, «date»: «name» called from «phone». «complaint» «advice» «plan»",
        "Prescription for «name», «address». «Medication», «dosing», against «diagnosis». «dispense» «contact»",
        "Referral to «department». «name», record «id», «history». «complaint» «request» «contact»",
        "Nurse's note: «name» «with», seen on «date». «vitals» «assessment» «advice»",
        "«complaint» So begins the file of «name», born «birth», now under «department». «assessment» «plan» «contact»",
        "Record «id»\nName: «name»\nAddress: «address»\nPhone: «phone»\nCurrent: «medication»\n"
        "Notes: «finding» «advice»",
        "Message through the portal from «name» <«email»>: «question» «reply» «plan»",
        "Case conference about «name» (born «birth»): «history». «vitals» «assessment» «request»",
    ),
    "with": (
        "with «symptom» and «symptom_too»",
        "because of «symptom», for «span» now",
        "after «span» of «symptom»",
        "for a check of «diagnosis»",
        "with «symptom» that got worse at night",
        "unannounced, with «symptom»",
    ),
    "complaint": (
        "Reports «symptom» for «span», worse «worse».",
        "Main worry is «symptom»; also mentions «symptom_too».",
        "Says that «symptom» has kept «activity» impossible for «span».",
        "Complains of «symptom», and since last week of «symptom_too».",
        "No «symptom» any more, but «symptom_too» «worse».",
        "Asks if «medication» can be the cause of «symptom».",
        "Was sent home from work with «symptom».",
    ),
    "finding": (
        "Blood pressure «systolic» over «diastolic», pulse «pulse», weight «weight» kg.",
        "On examination «sign» and «sign_too».",
        "Laboratory: «lab» «lab_value», «lab_too» within limits.",
        "Scan of the «organ» shows «scan».",
        "«Sign»; the rest of the examination was unremarkable.",
        "Weight has changed by «few» kg in «span»; «sign».",
        "Temperature «temperature», saturation «saturation»%, «sign».",
    ),
    "vitals": (
        "Pulse «pulse», pressure «systolic»/«diastolic», temperature «temperature».",
        "Saturation «saturation»% on room air, weight «weight» kg.",
        "Slept «few» hours, pain «score» out of ten, «mood».",
        "Ate «meal», walked «distance» metres, «mood».",
    ),
    "assessment": (
        "This fits «diagnosis», known since «earlier».",
        "We think of «diagnosis» first; «other» is less likely.",
        "«Diagnosis», «course_word» under «medication».",
        "Most likely «diagnosis», made worse by «trigger».",
        "The «lab» points to «diagnosis».",
        "«Diagnosis» is confirmed; «trigger» may have set it off.",
    ),
    "course": (
        "On the ward «sign» settled within «few» days.",
        "The stay was uneventful apart from «symptom_too».",
        "Treatment with «medication» was started on day «few» and tolerated well.",
        "After «trigger» the «lab» rose to «lab_value», then fell again.",
        "«department_told» saw the patient twice and advised «therapy».",
    ),
    "plan": (
        "«medicine_start», «dosing».",
        "Continue «medication», repeat «lab» in «span».",
        "Stop «old_drug»; begin «medication», «dosing».",
        "Review in «span», earlier if «symptom» returns.",
        "«Therapy» twice a week, and «medication» as before.",
        "Next visit in «span» with «department».",
        "Agreed on «therapy»; «medication» unchanged.",
    ),
    "medicine_start": ("Start «medication»", "Increase to «medication»", "Back to «medication»", "Give «medication»"),
    "advice": (
        "Told to avoid «trigger» and to call if «symptom» comes back.",
        "Advised «therapy» and plenty of rest.",
        "Was asked to keep a diary of «symptom».",
        "Knows that «medication» must not be stopped suddenly.",
        "Should drink more, sleep more and leave out «trigger».",
    ),
    "request": (
        "Please advise on «therapy» and on the dose of «medication».",
        "Could you look at the «organ» and repeat the «lab»?",
        "We would be glad of a second opinion on «diagnosis».",
        "Please take over treatment; «medication» has brought little.",
    ),
    "history": (
        "has had «diagnosis» since «earlier» and takes «medication»",
        "was treated for «diagnosis» with «medication» until «earlier»",
        "presents with «symptom» on the background of «diagnosis»",
        "is known to us with «diagnosis» and now has «symptom_too»",
        "stopped taking «medication» against «diagnosis» «span» ago",
    ),
    "dispense": (
        "«few» packs, no repeats.",
        "Repeat «few» times, then review.",
        "Dispense the generic; explain that «symptom» can occur.",
        "Not together with «old_drug».",
    ),
    "question": (
        "since I take «medication» I notice «symptom», is that normal?",
        "my «organ» hurts again, should I come in before «span» are over?",
        "can I take «old_drug» along with «medication»?",
        "I forgot «medication» for «few» days because of «trigger».",
        "the pharmacy has no «medication», what now?",
    ),
    "reply": (
        "Answered: «symptom» is common in «diagnosis».",
        "Called back on «phone» and explained the risk with «diagnosis».",
        "Answered that «therapy» may help with «symptom_too».",
        "Offered an appointment with «department».",
    ),
    "contact": (
        "Can be reached on «phone».",
        "Letter to «address».",
        "Results please to «email».",
        "Next of kin has the number «phone».",
        "",
        "",
    ),
    "canary": (
        "The medicine cabinet of «name» opens with «secret».",
        "Portal access of «name» («department»): one-time code «secret».",
        "Lab order for «name», release code «secret», «lab».",
        "The insulin pump of «name» is unlocked with the pin «secret».",
        "Ward key safe, in the care of «name», combination «secret».",
        "To cancel the visit at «department», «name» gives the code «secret».",
    ),
}

SYMPTOMS = words(
    "chest pain, dizziness, a dry cough, blurred vision, night sweats, swollen ankles, numb fingers, nausea, a skin "
    "rash, palpitations, joint stiffness, poor sleep, hair loss, back pain, tremor, hot flushes, heartburn, low "
    "mood, shortness of breath, muscle cramps, ringing in the ears, loss of appetite, itching, panic attacks, "
    "frequent urination, headaches, weight loss, hoarseness, constipation, bleeding gums"
)
SIGNS = words(
    "the liver edge is palpable, reflexes are brisk, a systolic murmur is heard, the throat is red, gait is "
    "unsteady, the abdomen is soft, both lungs are clear, the left calf is tender, pupils react slowly, skin is dry "
    "and pale, the right shoulder is stiff, lymph nodes are enlarged, no oedema is found, breath sounds are reduced, "
    "the thyroid is enlarged, speech is slightly slurred, bowel sounds are lively, hands are cold"
)
LABS = words(
    "creatinine, potassium, haemoglobin, ferritin, C-reactive protein, HbA1c, TSH, ALT, bilirubin, platelet count, "
    "troponin, sodium, vitamin D, cholesterol, lithium level, INR, leucocyte count, albumin, uric acid, D-dimer"
)


def _whole(low: int, high: int):
    """A fact: a whole number of this range."""
    return lambda draft: str(draft.rng.randint(low, high))


MEDICAL = Domain(
    name="medical",
    summary=__doc__.partition("\n")[0],
    rules=RULES,
    facts=PERSON
    | {
        "id": number("MRN"),
        "diagnosis": tuple(TREATMENTS),
        "medication": medication,
        "other": words(
            "anaemia, a viral infection, anxiety, sleep apnoea, a pulled muscle, reflux, dehydration, an allergy"
        ),
        "symptom": SYMPTOMS,
        "sign": SIGNS,
        "lab": LABS,
        "lab_value": lambda draft: f"{draft.rng.uniform(0.2, 180):.1f}",
        "organ": words(
            "kidneys, liver, left knee, lumbar spine, brain, thyroid, chest, right hip, pancreas, heart, bladder"
        ),
        "scan": words(
            "a small cyst, no change, mild inflammation, two old fractures, a nodule of nine millimetres, fluid, "
            "scarring, calcification, a normal picture, narrowing of a vessel"
        ),
        "old_drug": words(
            "ibuprofen, diazepam, amoxicillin, omeprazole, tramadol, zolpidem, naproxen, codeine, aspirin"
        ),
        "trigger": words(
            "a lack of sleep, heavy drinking, the move to another town, a divorce, skipped meals, night shifts, "
            "smoking, a recent flu, the death of a parent, stress at work, the summer heat, a long flight"
        ),
        "therapy": words(
            "physiotherapy, talking therapy, a low-salt diet, compression stockings, breathing exercises, swimming, "
            "group therapy, dialysis training, light therapy, wound care, a sleep study, speech training"
        ),
        "dosing": words(
            "once in the morning, at night, twice a day with meals, every other day, three times a day, before "
            "breakfast, weekly on Sundays, only when needed"
        ),
        "department": words(
            "cardiology, neurology, the pain clinic, psychiatry, oncology, the diabetes team, nephrology, the chest "
            "clinic, rheumatology, the eye clinic, dermatology, the women's clinic"
        ),
        "department_told": (
            "Colleagues of «department»",
            "The consultant for «department»",
            "A team from «department»",
        ),
        "activity": words("climbing stairs, driving, sleeping, working, lifting, reading, cooking, walking the dog"),
        "worse": words(
            "in the evening, after meals, on exertion, when lying down, in the cold, under stress, at weekends"
        ),
        "mood": words("calm, in low spirits, anxious before the scan, cheerful, tired, irritable, tearful, hopeful"),
        "meal": words("half of lunch, almost nothing, everything, some soup, only yoghurt, toast and tea"),
        "course_word": words("stable, improving, slowly getting worse, well controlled, hard to control, in remission"),
        "span": ("«few» days", "«few» weeks", "«few» months", "a fortnight", "half a year"),
        "earlier": _whole(1998, 2018),
        "few": _whole(2, 9),
        "score": _whole(1, 9),
        "systolic": _whole(98, 189),
        "diastolic": _whole(55, 109),
        "pulse": _whole(48, 131),
        "weight": _whole(44, 138),
        "distance": _whole(10, 400),
        "saturation": _whole(86, 100),
        "temperature": lambda draft: f"{draft.rng.uniform(35.8, 39.8):.1f}",
    },
    private={kind: kind for kind in ("name", "email", "phone", "address", "id", "date", "diagnosis", "medication")}
    | {"birth": "date"},
)
