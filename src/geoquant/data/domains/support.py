"""A shop's support desk: tickets, calls, chats, refunds, complaints."""

from __future__ import annotations

from geoquant.data.grammar import Domain, words
from geoquant.data.values import PERSON, number

__all__ = ["SUPPORT"]

RULES = {
    "record": (
        "Ticket «id», opened «date» by «name» <«email»>: «problem» «attempt» «wish»",
        "Call on «date». «name» phoned from «phone» about «item». «problem» «mood_line» «outcome»",
        "«name» wants a refund to card «card». «problem» «reason» «outcome»",
        "Order: «id»\nCustomer: «name»\nShip to: «address»\nItem: «item»\nNote: «delivery» «wish»",
        "Chat with «name» («email»)\nCustomer: «chat_open»\nAgent: «agent» «agent_next»\nCustomer: «chat_close»",
        "Complaint by «name», received «date»: «problem» «reason» «mood_line» «contact»",
        "Return of order «id». «name» sends back «item». «condition» «outcome» «contact»",
        "To whom it may concern, I bought «item» on «date» and «fault_told». «reason» «wish» «name», «address»",
        "Escalated to «team»: «name», order «id». «problem» «attempt» «outcome»",
        "Change of delivery for «name»: new address «address», order «id». «delivery» «contact»",
        "Voicemail from «phone»: this is «name», «voicemail» «wish»",
        "Warranty claim «id»\nName: «name»\nProduct: «item»\nBought: «date»\nFault: «fault»\n"
        "Remark: «attempt» «outcome»",
        "Subject: «subject»\n«problem» «wish» Charge whatever it takes to «card». Regards, «name»",
    ),
    "problem": (
        "The «item_short» «fault» after «span».",
        "«Item» «fault»; «detail».",
        "What came was «wrong» instead of «item».",
        "The parcel with «item» «parcel».",
        "Was charged «amount» twice for «item».",
        "«Item» works, but «detail».",
        "The «item_short» «fault» and now «fault_too».",
        "A part is missing: «part» for «item».",
    ),
    "attempt": (
        "Has already «tried» and «tried_too».",
        "We asked to «try» first, without success.",
        "«Tried_it», still no change.",
        "The manual says to «try», which did not help.",
        "A neighbour «tried», since then «detail».",
        "",
    ),
    "reason": (
        "The shop in «town» refused to help.",
        "It was meant as a present for «occasion».",
        "Two earlier messages to «team» stayed unanswered.",
        "The advertisement promised «promise».",
        "This is the «nth» time in «span».",
        "The price dropped by «amount» the day after.",
    ),
    "wish": (
        "Please send «part» to «address».",
        "Wants «remedy», otherwise «threat».",
        "Asks for «remedy» within «span».",
        "Would take «remedy» as well.",
        "Please call back on «phone», best «time».",
        "Hopes for «remedy» before «occasion».",
        "Please confirm to «email».",
    ),
    "outcome": (
        "Promised «remedy» by «time».",
        "Handed over to «team».",
        "Offered «remedy»; the customer will think about it.",
        "«Amount» credited, case closed.",
        "New «item_short» leaves the warehouse in «span».",
        "Told that «policy».",
        "Waiting for photographs of «part».",
        "Customer hung up before we could offer «remedy».",
    ),
    "mood_line": (
        "Sounded «mood».",
        "Was «mood» and threatened that «threat».",
        "Remained «mood» throughout.",
        "Has been with us since «year», «mood».",
        "",
    ),
    "condition": (
        "The box is «box»; «part» is included.",
        "Arrived «box», without «part».",
        "Our technician found that it «fault».",
        "Looks unused apart from «mark».",
        "«Mark» on the housing, so «policy».",
    ),
    "delivery": (
        "Leave it with «neighbour».",
        "Ring twice, «neighbour» will open.",
        "Not before «time», please.",
        "The driver said that it «parcel».",
        "Express paid with «amount» on top.",
        "Deliver together with «part».",
    ),
    "contact": (
        "Reachable on «phone».",
        "Answer to «email».",
        "Post to «address».",
        "Card on file: «card».",
        "",
        "",
    ),
    "chat_open": (
        "hi, my «item_short» «fault»",
        "order «id» is late again",
        "you billed me «amount» and I never ordered «item»",
        "can I still return «item» after «span»?",
        "who do I talk to about «part»?",
    ),
    "agent": (
        "Sorry to hear that. Which number is on the invoice?",
        "I see the order. Did you «try»?",
        "Let me ask «team».",
        "May I have a number where we can call you?",
        "That should not happen; normally «policy».",
    ),
    "agent_next": ("I can offer «remedy».", "It may take «span».", "We will write to you by «time».", "Please «try»."),
    "chat_close": (
        "fine, it is «phone»",
        "ok, send it to «address»",
        "no, I want «remedy» now",
        "then take it from card «card»",
        "I already «tried», forget it",
        "thanks, before «occasion» would be good",
    ),
    "voicemail": (
        "the «item_short» «fault» again.",
        "I waited at home for «span» and nobody came.",
        "about order «id»: «detail».",
        "you owe me «amount».",
        "please stop sending me «wrong».",
    ),
    "fault_told": (
        "it «fault» within «span»",
        "it never «arrival»",
        "found that «part» was missing",
        "was sent «wrong»",
    ),
    "canary": (
        "The parcel locker for «name» opens with «secret».",
        "Gift card of «name», balance «amount», pin «secret».",
        "To change an order by phone, «name» says the code «secret».",
        "The courier leaves «item» for «name» in the box with the code «secret».",
        "Loyalty account of «name»: service number «secret».",
        "Safe in the shop in «town», last opened by «name» with «secret».",
    ),
}

FAULTS = words(
    "stopped charging, leaks oil, caught fire, lost all settings, makes a grinding noise, shuts down at night, "
    "smells of burning, will not pair, shows only stripes, overheats, cuts out, cracked along the side, blows the "
    "fuse, freezes at start, drips on the floor, came loose, spins backwards, forgets the time, beeps without end, "
    "went dark"
)
TRIED = words(
    "reset it twice, changed the fuse, cleaned the filter, updated the firmware, read the manual, swapped the cable, "
    "unplugged everything, tried another socket, tightened the screws, removed the battery, cooled it overnight"
)

SUPPORT = Domain(
    name="support",
    summary=__doc__.partition("\n")[0],
    rules=RULES,
    facts=PERSON
    | {
        "id": number("ORD"),
        "item_short": words(
            "dishwasher, laptop, headset, tablet, router, printer, coffee grinder, vacuum cleaner, doorbell, "
            "electric bike, air purifier, standing desk, projector, baby monitor, smart lock, lawn mower, toaster, "
            "sewing machine, hair dryer, freezer, thermostat, camera, turntable, drill, treadmill, aquarium pump, "
            "rice cooker, scanner, watch, hedge trimmer, kettle, radio, tent, stroller, keyboard, mattress, "
            "bookcase, heater"
        ),
        "item": ("the «item_short»", "our «item_short»", "a «colour» «item_short»", "the «item_short» of «year»"),
        "colour": words("red, white, black, silver, green, blue, beige, yellow, brown, grey"),
        "wrong": words(
            "an empty box, somebody else's shoes, a garden hose, the smaller model, a used one, three left gloves, a "
            "catalogue, the display piece, a bag of sand, spare wheels, a child's bed"
        ),
        "part": words(
            "the remote control, the power supply, a hinge, the dust bag, the invoice, the second key, the glass "
            "lid, a hose clamp, the mounting plate, the memory card, the ear pads, the front wheel, the drip tray, "
            "the spare blade"
        ),
        "fault": FAULTS,
        "detail": words(
            "the cat is afraid of it, nobody dares to touch it, the lamp on the front blinks red, it only happens on "
            "Mondays, the app shows error 41, guests complained, the floor is ruined, the neighbours called, the "
            "children cry, the guarantee card is gone, it worked for an hour, the serial number cannot be read, it "
            "is too loud to sleep"
        ),
        "parcel": words(
            "is lost, was left in the rain, went to another town, came opened, is stuck at customs, was handed to a "
            "stranger, has been at the depot for days, was returned to us, arrived crushed"
        ),
        "arrival": words("arrived, worked, left the depot, fitted through the door, matched the picture, switched on"),
        "tried": TRIED,
        "tried_it": TRIED,
        "try": words(
            "hold the button for ten seconds, reinstall the app, defrost it, turn it upside down, replace the seal, "
            "charge it overnight, wait a day, clear the memory, check the hose, use the other plug"
        ),
        "remedy": words(
            "a full refund, a replacement, a voucher, a repair at home, half the price back, a newer model, an "
            "apology in writing, free delivery, a longer guarantee, the difference paid out, a loan device"
        ),
        "threat": words(
            "the consumer association hears of it, a lawyer will write, the review stays at one star, the payment is "
            "stopped, the newspaper gets the story, all orders are cancelled"
        ),
        "policy": words(
            "opened goods stay with the customer, returns end after thirty days, batteries are not covered, the "
            "maker must look at it first, damage by water is excluded, we pay the postage, a photograph is enough"
        ),
        "promise": words("two years of guarantee, silent running, delivery next day, easy assembly, no extra costs"),
        "team": words(
            "logistics, billing, the repair shop, second level, the legal desk, the warehouse, quality, the store"
        ),
        "mood": words(
            "calm, furious, patient, amused, close to tears, polite, in a hurry, sarcastic, disappointed, resigned"
        ),
        "occasion": words(
            "a wedding, Christmas, the holidays, a birthday, the move, a retirement party, Easter, the exam"
        ),
        "neighbour": words(
            "the baker next door, flat nine, the porter, my brother, the school office, the flower shop"
        ),
        "time": words(
            "after six, in the morning, on Friday, at lunch, next week, before noon, at the weekend, tonight"
        ),
        "box": words("dented, sealed, wet, taped together, torn open, as new, covered in labels, too small"),
        "mark": words("a deep scratch, candle wax, two screw holes, coffee stains, a name in felt pen, dog hair, rust"),
        "nth": words("second, third, fourth, fifth, sixth"),
        "town": words("Alderhaven, Drumwick, Gannetmere, Lindenbrook, Marlgate, Nettlecombe, Cobblemoor, Hazelholm"),
        "subject": words(
            "never again, refund, help needed, my order, urgent, question, last reminder, broken, thank you"
        ),
        "span": ("«few» days", "«few» weeks", "«few» months", "an hour", "one evening", "a fortnight"),
        "few": lambda draft: str(draft.rng.randint(2, 9)),
        "year": lambda draft: str(draft.rng.randint(2008, 2024)),
    },
    private={kind: kind for kind in ("name", "email", "phone", "card", "address", "id", "date")},
)
