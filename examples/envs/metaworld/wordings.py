"""Rephrasings of Meta-World's instructions, for training: three for each, none of them in `metaworld/language.py`.

`push-back` has the same instruction as `push`, so it is not listed.
"""

OTHER_WORDINGS = {
    "button-press": ["Push the button in", "Press the red button", "Hit the button on the box"],
    "button-press-topdown": ["Push the button down from above", "Press down on the button", "Hit the button's top"],
    "button-press-topdown-wall": [
        "Go over the wall and push the button down",
        "Press the button behind the wall from above",
        "Reach past the wall, then press down on the button",
    ],
    "button-press-wall": [
        "Go around the wall and push the button in",
        "Press the button that is behind the wall",
        "Reach past the wall and hit the button",
    ],
    "coffee-button": [
        "Start the coffee machine",
        "Press the coffee maker's button",
        "Make coffee by pushing the button",
    ],
    "dial-turn": ["Turn the dial", "Rotate the knob half way around", "Turn the knob by 180 degrees"],
    "door-close": ["Shut the door", "Swing the door closed", "Push the door until it is closed"],
    "door-lock": ["Turn the lock clockwise", "Lock the door", "Lock it by turning the door's lock to the right"],
    "door-open": ["Pull the door open", "Swing the door open", "Open the safe's door"],
    "door-unlock": [
        "Turn the lock counter-clockwise",
        "Unlock the door",
        "Unlock it by turning the door's lock to the left",
    ],
    "drawer-close": ["Shut the drawer", "Push the drawer in", "Slide the drawer closed"],
    "drawer-open": ["Pull the drawer open", "Pull the drawer out", "Slide the drawer open by its handle"],
    "faucet-close": ["Turn the faucet clockwise", "Close the tap", "Turn the water off"],
    "faucet-open": ["Turn the faucet counter-clockwise", "Open the tap", "Turn the water on"],
    "handle-press": ["Push the handle down", "Press down the lever of the box", "Lower the handle"],
    "handle-press-side": [
        "Push the handle down from the side",
        "Press the sideways handle down",
        "Lower the handle that is on the side",
    ],
    "handle-pull": ["Lift the handle", "Raise the handle", "Pull the handle upwards"],
    "handle-pull-side": [
        "Lift the handle from the side",
        "Raise the handle that is on the side",
        "Pull the sideways handle upwards",
    ],
    "lever-pull": ["Turn the lever by 90 degrees", "Pull the lever", "Move the lever a quarter of a turn"],
    "peg-unplug-side": ["Pull the peg out sideways", "Take the peg out of its hole", "Remove the plug from the box"],
    "plate-slide": [
        "Push the plate into the cabinet",
        "Move the plate into the shelf",
        "Shove the dish into the cabinet",
    ],
    "plate-slide-back": [
        "Take the plate out of the cabinet",
        "Pull the plate back from the cabinet",
        "Slide the dish out of the cabinet",
    ],
    "plate-slide-back-side": [
        "Take the plate out of the cabinet to the side",
        "Pull the plate sideways from the cabinet",
        "Slide the dish sideways out of the cabinet",
    ],
    "plate-slide-side": [
        "Push the plate sideways into the cabinet",
        "Move the plate into the cabinet from the side",
        "Shove the dish sideways into the cabinet",
    ],
    "reach": ["Move to the goal", "Bring the hand to the goal position", "Touch the goal with the gripper"],
    "reach-wall": [
        "Go around the wall and move to the goal",
        "Reach the goal behind the wall",
        "Bring the hand past the wall to the goal",
    ],
    "window-close": ["Slide the window closed", "Shut the window", "Push the window until it is closed"],
    "window-open": ["Slide the window open", "Push the window open", "Move the window so that it is open"],
    "basketball": [
        "Put the ball into the basket",
        "Throw the ball through the hoop",
        "Drop the basketball into the net",
    ],
    "bin-picking": [
        "Move the puck to the other bin",
        "Take the puck out of its bin and drop it into the other one",
        "Pick the puck from one box and put it into the other box",
    ],
    "box-close": ["Put the lid on the box", "Close the box with its cover", "Grasp the lid and shut the box"],
    "coffee-pull": [
        "Take the mug away from the coffee machine",
        "Pull the cup out of the coffee maker",
        "Drag the mug from the machine to the goal",
    ],
    "coffee-push": [
        "Put the mug under the coffee machine",
        "Push the cup to the coffee maker",
        "Move the mug below the machine",
    ],
    "hammer": [
        "Drive the nail in with the hammer",
        "Hit the screw with the hammer",
        "Use the hammer on the wall's nail",
    ],
    "peg-insert-side": [
        "Put the peg into the hole sideways",
        "Plug the peg into the box",
        "Push the stick into the hole at the side",
    ],
    "push-wall": [
        "Push the puck around the wall to the goal",
        "Move the puck past the wall to its goal",
        "Get the puck to the goal behind the wall",
    ],
    "soccer": ["Push the ball into the goal", "Score a goal with the soccer ball", "Shoot the ball into the net"],
    "sweep": [
        "Push the puck off the table",
        "Wipe the puck over the table's edge",
        "Sweep the cube away from the table",
    ],
    "sweep-into": ["Push the puck into the hole", "Wipe the puck into the hole", "Sweep the cube into the opening"],
    "assembly": ["Put the nut on the peg", "Grasp the ring and place it onto the peg", "Assemble the nut and the peg"],
    "hand-insert": ["Put the hand into the hole", "Move the gripper into the hole", "Lower the hand into the opening"],
    "pick-out-of-hole": [
        "Take the puck out of the hole",
        "Lift the puck from the hole",
        "Get the puck out of its hole",
    ],
    "pick-place": [
        "Pick up the puck and bring it to the goal",
        "Lift the puck to the goal position",
        "Grasp the puck, then place it at the goal",
    ],
    "push": ["Slide the puck to the goal", "Move the puck over the table to the goal", "Shove the puck to its goal"],
    "disassemble": ["Take the nut off the peg", "Lift the ring from the peg", "Remove the nut from its peg"],
    "pick-place-wall": [
        "Lift the puck over the wall and place it at the goal",
        "Pick up the puck and bring it past the wall",
        "Grasp the puck, go over the wall and place it",
    ],
    "shelf-place": [
        "Put the puck on the shelf",
        "Pick up the puck and set it on the shelf",
        "Lift the cube onto the shelf",
    ],
    "stick-pull": [
        "Pull the box with the stick",
        "Use the stick to pull the box closer",
        "Take the stick and drag the thermos by its handle",
    ],
    "stick-push": [
        "Push the box with the stick",
        "Use the stick to push the box away",
        "Take the stick and shove the thermos with it",
    ],
}
