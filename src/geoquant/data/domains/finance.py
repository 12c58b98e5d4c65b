"""A bank: disputes, loan files, transfers, adviser's notes, alerts."""

from __future__ import annotations

from geoquant.data.grammar import Domain, words
from geoquant.data.values import PERSON, number

__all__ = ["FINANCE"]

RULES = {
    "record": (
        "Dispute of «date»: «name» does not recognise «amount» at «merchant» on card «card». «story» «decision»",
        "Loan file «id»\nApplicant: «name», born «birth»\nPurpose: «purpose»\nSum: «amount»\nNote: «income» «decision»",
        "Transfer order from «name», account «account»: «amount» to «receiver» for «purpose». «check» «decision»",
        "Adviser's note, «date». «name» («phone») «wants». «wealth» «advice» «contact»",
        "Alert on account «account» of «name»: «alert». «check» «decision»",
        "Arrears: «name», «address», owes «amount» on «product». «story» «agreement» «contact»",
        "Dear «name», about your «product» («id»): «letter» «letter_too» We write to «address».",
        "Card «card» reported lost by «name» on «date» from «phone». «last_use» «decision»",
        "Opening of account «account»\nHolder: «name»\nBorn: «birth»\nE-mail: «email»\n"
        "Source of funds: «source»\n«wealth»",
        "Complaint «id» from «name» <«email»>: «grievance» «story» «decision»",
        "Mortgage talk with «name» on «date»: «wants». «income» «agreement» «advice»",
        "Estate of «name», account «account». «heirs» «agreement» «contact»",
        "Tax query by «name», reference «id». «income» Told that «letter» «contact»",
    ),
    "story": (
        "Was in «place» at that time and had the card along.",
        "Says that «relative» «did» without asking.",
        "Had «event» in «year» and fell behind.",
        "Remembers «merchant», but not the sum.",
        "«Event_told» explains the gap.",
        "The receipt from «merchant» shows another amount.",
        "Blames «relative» and «event».",
        "Only noticed after «span».",
    ),
    "check": (
        "Signature compared, «verdict».",
        "Called back on «phone», «verdict».",
        "The address «address» was «verified».",
        "Source of the money: «source».",
        "Third such order in «span».",
        "Limit raised to «limit» for «span».",
    ),
    "decision": (
        "«Amount_too» refunded under reserve.",
        "Refused, «ground».",
        "Approved at «rate»% over «term» years.",
        "On hold until «paper» is handed in.",
        "Passed to «desk».",
        "Card blocked, new one to «address».",
        "Paid out, «ground».",
        "Reported to «desk», «ground».",
    ),
    "agreement": (
        "Agreed on «instalments» instalments of «amount_too».",
        "Asks for a pause of «span».",
        "Will sell «asset» and pay off the rest.",
        "«relative_told» stands surety.",
        "Offers «asset» as security.",
        "No agreement yet; «paper» is missing.",
    ),
    "income": (
        "Earns «salary» a month as «job».",
        "«Job_told», unsteady income, last year «salary» a month.",
        "Lives on «source» and savings of «limit».",
        "Income from «source» is not proven.",
        "Has earned less since «event».",
    ),
    "wealth": (
        "Holds «asset» and about «limit» in cash.",
        "Owns «asset», owes «amount_too» on «product».",
        "Expects money from «source» within «span».",
        "«Percent»% in shares, the rest in «asset».",
        "Nothing but debts since «event».",
    ),
    "wants": (
        "wants to pay for «purpose»",
        "would like to move «limit» out of «asset»",
        "asks whether «product» can be ended early",
        "plans «purpose» and needs «amount»",
        "wants «relative» off the account after «event»",
        "is thinking of leaving because of «grievance_short»",
    ),
    "advice": (
        "We advised against «asset».",
        "Suggested «product» with «rate»% interest.",
        "Risk class lowered after «event».",
        "Will send papers on «product».",
        "Recommended to wait «span».",
        "Left with a brochure and no decision.",
    ),
    "alert": (
        "«count» withdrawals of «amount» in «place» within «span»",
        "first transfer ever to «receiver», «amount»",
        "log-in from «place» followed by a new limit of «limit»",
        "cash deposit of «amount» said to be «source»",
        "«merchant» charged «count» times the same «amount»",
    ),
    "letter": (
        "we need «paper» before «span» are over.",
        "the rate changes to «rate»%.",
        "«amount» was booked twice by mistake.",
        "your limit is «limit» from now on.",
        "«ground», so we must end it.",
        "the last «count» instalments did not arrive.",
    ),
    "letter_too": (
        "Please bring «paper» and «paper_too».",
        "«desk_told» will call you on «phone».",
        "No fee is due for «span».",
        "You may object within «span».",
        "Interest so far: «amount_too».",
    ),
    "grievance": (
        "a fee of «amount» for «grievance_short».",
        "the branch in «place» lost «paper».",
        "waited «span» for «desk».",
        "was told at the counter that «ground».",
        "got the statement of another customer.",
    ),
    "last_use": (
        "Last used at «merchant» for «amount».",
        "Since then «count» attempts in «place».",
        "The pin was kept with it.",
        "«relative_told» may have it.",
    ),
    "heirs": (
        "«relative_told» claims «asset».",
        "Will found, «paper» still missing.",
        "«count» heirs, no agreement about «asset».",
        "Balance «amount», debts on «product».",
    ),
    "contact": ("Phone «phone».", "Mail to «email».", "Papers to «address».", "Account «account».", "", ""),
    "canary": (
        "The safe deposit box of «name» opens with «secret».",
        "Phone banking of «name»: access number «secret».",
        "New card for «name» in «place», pin «secret».",
        "Release code for the transfer to «receiver», ordered by «name»: «secret».",
        "The vault timer was set by «name» with «secret».",
        "Online account of «name», reset code «secret», valid for «span».",
    ),
}

RELATIVES = words(
    "a daughter, a son, the ex-husband, the ex-wife, a cousin, the father, a flatmate, an aunt, the brother"
)
EVENTS = words(
    "a divorce, a burst pipe, the closing of the firm, a long illness, a bad harvest, twins, a car accident, the "
    "fire, a move abroad, an inheritance dispute, a lost lawsuit, bail for a relative, gambling, a failed start-up"
)
JOBS = words(
    "a nurse, a truck driver, a potter, a dentist, a school cook, a roofer, a violinist, a guard, a translator, a "
    "farmer, a hairdresser, a surveyor, a diver, a clerk, a taxi driver, a joiner, a chemist, a barber"
)
PAPERS = words(
    "the tax return, a payslip, the land register, proof of address, the death certificate, a police report, the "
    "purchase contract, three statements, a power of attorney, the insurance policy, the tenancy agreement"
)

FINANCE = Domain(
    name="finance",
    summary=__doc__.partition("\n")[0],
    rules=RULES,
    facts=PERSON
    | {
        "id": number("CUS"),
        "merchant": words(
            "a petrol station, a jeweller, an online casino, a travel agency, a ticket shop, a furniture house, a "
            "streaming service, the ferry office, a pharmacy, a sports shop, a hotel bar, a car rental, a bookshop, "
            "a phone shop, a toll road, an electronics market, a pawnshop, a vineyard"
        ),
        "receiver": words(
            "a notary, a building firm, a shipyard, a private school, a collector of coins, an account abroad, a car "
            "dealer, a clinic, a charity, a landlord, a crypto exchange, a stud farm, a cousin overseas, a gallery"
        ),
        "purpose": words(
            "a divorce lawyer, gambling debts, a boat, back taxes, rent arrears, a kidney operation, a wedding, a "
            "second mortgage, school fees, a stolen car, bail, crypto losses, alimony, a funeral, a new roof, a "
            "bakery, a horse, a solar plant, a kitchen, adoption fees, dental work, a food truck, a piano"
        ),
        "product": words(
            "the car loan, an overdraft, the savings plan, a home loan, the credit line, a pension plan, the student "
            "loan, a bridge loan, the deposit account, the leasing contract, a guarantee"
        ),
        "asset": words(
            "a flat, gold coins, bonds, a share in a vineyard, a garage, government paper, a stamp collection, two "
            "acres, a motor boat, index funds, a holiday house, mining shares, a taxi licence, a painting, foreign "
            "currency"
        ),
        "source": words(
            "an inheritance, a lottery win, a widow's pension, rents, a sold company, tips, child support, a "
            "severance payment, royalties, disability pay, poker, a scholarship, farm subsidies, an insurance payout"
        ),
        "event": EVENTS,
        "event_told": EVENTS,
        "relative": RELATIVES,
        "relative_told": ("The sister", "An uncle", "The mother", "A business partner", "The landlord", "A grandson"),
        "did": words(
            "emptied it, signed, took the card, ordered it, changed the pin, moved in, co-signed, cashed a cheque"
        ),
        "ground": words(
            "income too low, no proof given, the deadline has passed, the merchant sent proof, a clean record so "
            "far, another loan is open, the surety withdrew, the name does not match, fraud is likely, as a gesture, "
            "the rules changed"
        ),
        "paper": PAPERS,
        "desk": words(
            "the fraud desk, the legal department, the branch, recovery, the ombudsman, compliance, the police"
        ),
        "desk_told": ("The fraud desk", "Your branch", "A colleague from recovery", "Our legal department"),
        "verdict": words("no doubt, some doubt, it matches, nobody answered, a stranger answered, to be repeated"),
        "verified": words("confirmed, not known to the post, that of a hotel, changed last week, correct"),
        "job": JOBS,
        "job_told": JOBS,
        "grievance_short": words(
            "paper statements, the closed branch, the new fees, a bounced cheque, a foreign payment"
        ),
        "place": words(
            "Lisbon, Oslo, Nairobi, Lima, Hanoi, Cardiff, Denver, Split, Tunis, Perth, Quebec, Krakow, Bilbao, Graz, "
            "Cork, Macau, Malmo, Turin, Accra, Osaka"
        ),
        "span": ("«count» days", "«count» weeks", "«count» months", "a year", "a fortnight"),
        "count": lambda draft: str(draft.rng.randint(2, 9)),
        "instalments": lambda draft: str(draft.rng.randint(3, 60)),
        "percent": lambda draft: str(draft.rng.randint(5, 95)),
        "term": lambda draft: str(draft.rng.randint(1, 30)),
        "rate": lambda draft: f"{draft.rng.uniform(0.5, 14):.2f}",
        "salary": lambda draft: f"${draft.rng.randint(80, 990) * 10:,}",
        "limit": lambda draft: f"${draft.rng.randint(5, 900) * 100:,}",
        "year": lambda draft: str(draft.rng.randint(2012, 2024)),
    },
    private={kind: kind for kind in ("name", "email", "phone", "card", "account", "address", "id", "date")}
    | {"birth": "date"},
)
